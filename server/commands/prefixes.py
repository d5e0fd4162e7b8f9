"""`vecinfer prefixes`: cached beginnings on disk; of a running server, or in its folder while none runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from server.errors import ConfigError, ServerError
from server.terminal.client import DEFAULT_URL, NoServerError, connect, raise_for_error

T = TypeVar("T")
Url = Annotated[str, typer.Option(help="The server.")]
KeyFile = Annotated[Path | None, typer.Option(help="A file with the server's admin key.")]
Folder = Annotated[
    Path | None, typer.Option(help="Work on this data directory instead of asking a server. Default: ask first.")
]

prefixes = typer.Typer(
    no_args_is_help=True,
    help="Cached beginnings of prompts on disk: list, clear, verify. Without a running server, in its data directory.",
)


def register(app: typer.Typer) -> None:
    """Add `vecinfer prefixes`."""
    app.add_typer(prefixes, name="prefixes")


@prefixes.command("list")
def list_prefixes(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, data_dir: Folder = None) -> None:
    """Show the stored prefixes, the latest used first."""

    def in_folder(folder: Path) -> list[dict[str, Any]]:
        from server.prefix_disk.inspection import list_folder

        return [{**vars(p), "tokens": p.num_tokens} for p in list_folder(folder)]

    found = _asked("GET", "/admin/prefixes", url, admin_key_file, data_dir, in_folder, lambda answer: answer["data"])
    table = Table("id", "tokens", "tail", "pages", "last used", "model and artifact", box=None, padding=(0, 2, 0, 0))
    for prefix in found:
        table.add_row(
            prefix["id"][:12], f"{prefix['tokens']:,}", _mib(prefix["tail_bytes"]), _mib(prefix["page_bytes"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(prefix["last_used"])), prefix["label"],
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table if found else "no prefixes are stored")


@prefixes.command("clear")
def clear_prefixes(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, data_dir: Folder = None) -> None:
    """Delete all cached beginnings: a server's in memory too."""

    def in_folder(folder: Path) -> str:
        from server.prefix_disk.inspection import clear_folder

        return f"{clear_folder(folder):,} prefixes deleted"

    def told(answer: dict[str, Any]) -> str:
        return f"{answer['on_disk']:,} prefixes deleted on disk, {answer['in_memory']:,} snapshots in memory"

    typer.echo(_asked("DELETE", "/admin/prefixes", url, admin_key_file, data_dir, in_folder, told))


@prefixes.command("verify")
def verify_prefixes(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None, data_dir: Folder = None) -> None:
    """Read every stored object and say what is damaged; a running server drops it. Exit code 1: something was."""

    def in_folder(folder: Path) -> dict[str, Any]:
        from server.prefix_disk.inspection import inspect_folder

        found = inspect_folder(folder)
        return {"objects": found.num_objects, "bytes": found.num_bytes, "damaged": found.lines}

    found = _asked("POST", "/admin/prefixes/verify", url, admin_key_file, data_dir, in_folder, lambda answer: answer)
    for line in found["damaged"]:
        typer.echo(line, err=True)
    wrong = f"{len(found['damaged'])} damaged" if found["damaged"] else "all as written"
    typer.echo(f"{found['objects']:,} objects of {_mib(found['bytes'])} read: {wrong}")
    if found["damaged"]:
        raise typer.Exit(1)


def _asked(
    method: str,
    path: str,
    url: str,
    key_file: Path | None,
    data_dir: Path | None,
    in_folder: Callable[[Path], T],
    told: Callable[[dict[str, Any]], T],
) -> T:
    """What the server says, or where none runs, what the folder does.

    Raises:
        ServerError: neither can be had.
    """
    if data_dir is None:
        try:
            with connect(url, admin=True, admin_key_file=key_file) as client:
                # Reading gigabytes takes a while.
                response = client.request(method, path, timeout=600)
                raise_for_error(response)
                return told(response.json())
        except NoServerError:
            if url != DEFAULT_URL:
                raise
    return _without_server(data_dir, in_folder)


def _without_server(data_dir: Path | None, in_folder: Callable[[Path], T]) -> T:
    import sqlite3

    from server.config import ServerConfig, user_data_dir
    from server.prefix_disk.inspection import FOLDER, INDEX_FILE

    folder = user_data_dir(ServerConfig(data_dir=data_dir)) / FOLDER
    if not (folder / INDEX_FILE).is_file():
        asked = f"no server answers at {DEFAULT_URL}, and " if data_dir is None else ""
        raise ConfigError(f"{asked}no prefixes are stored in {folder}")
    Console(stderr=True, soft_wrap=True).print(f"in {folder}", highlight=False, markup=False)
    try:
        return in_folder(folder)
    except BlockingIOError as error:
        raise ServerError(f"{folder} is in use by a server; give its --url") from error
    except (OSError, sqlite3.Error) as error:
        raise ServerError(f"{folder}: {error}") from error


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
