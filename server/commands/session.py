"""`vecinfer session`: conversations kept by name in a running server, and moved to another machine as files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from server.errors import ConfigError
from server.terminal.client import DEFAULT_URL, connect, raise_for_error

Name = Annotated[str, typer.Argument(help="The session's name.")]
Url = Annotated[str, typer.Option(help="The server.")]
KeyFile = Annotated[Path | None, typer.Option(help="A file with the server's admin key.")]
Replace = Annotated[bool, typer.Option("--replace", help="Take the place of a session of this name.")]
_CHUNK_BYTES = 1 << 20

session = typer.Typer(
    no_args_is_help=True,
    help="Conversations kept by name: what a server has read of them is not read again, here or on another machine.",
)


def register(app: typer.Typer) -> None:
    """Add `vecinfer session`."""
    app.add_typer(session, name="session")


@session.command("list")
def list_sessions(url: Url = DEFAULT_URL, admin_key_file: KeyFile = None) -> None:
    """Show the saved sessions."""
    found = _asked(url, admin_key_file, "GET", "")["data"]
    table = Table("name", "tokens", "size", "saved", "model", "artifact", box=None, padding=(0, 2, 0, 0))
    for one in found:
        if one["damaged"]:
            table.add_row(one["name"], "damaged")
            continue
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["created"]))
        table.add_row(
            one["name"], f"{one['tokens']:,}", _mib(one["bytes"]), saved, one["model"], one["artifact"] or "none"
        )
    Console(highlight=False).print(table if found else "no sessions are saved")


@session.command("save")
def save(
    name: Name,
    response_id: Annotated[str | None, typer.Option(help="The id of an answer of that conversation.")] = None,
    messages: Annotated[Path | None, typer.Option(help="A JSON file: messages, or a request of the chat API.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="A text file that the conversation begins with.")] = None,
    replace: Replace = False,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
) -> None:
    """Keep what is in the cache of a conversation under a name. Tells how many tokens that is."""
    body: dict[str, Any] = {"name": name, "replace": replace, "response_id": response_id}
    if messages is not None:
        given = _json(messages)
        known = ("messages", "tools", "chat_template_kwargs", "cache_salt")
        body |= {"messages": given} if isinstance(given, list) else {k: given[k] for k in known if k in given}
    if prompt is not None:
        body["prompt"] = _text(prompt)
    found = _asked(url, admin_key_file, "POST", "", json={k: v for k, v in body.items() if v is not None})
    of = f" of {found['prompt_tokens']:,}" if found.get("prompt_tokens") else ""
    typer.echo(f"{name}: {found['tokens']:,}{of} tokens, {_mib(found['bytes'])}")


@session.command("restore")
def restore(
    name: Name,
    cache_salt: Annotated[str | None, typer.Option(help="The salt of the requests that are to find it.")] = None,
    for_key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key whose holder is to find it.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
) -> None:
    """Load a session into the cache: the next request with its beginning goes on from there."""
    body = {"cache_salt": cache_salt, "api_key": None if for_key_file is None else _text(for_key_file).strip()}
    found = _asked(url, admin_key_file, "POST", f"{_part(name)}/restore", json=body)
    typer.echo(f"{name}: {found['tokens']:,} tokens are in the cache")


@session.command("export")
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to write it; must not be there yet.")],
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
) -> None:
    """Write a session to a file that another machine with the same model and artifact can import."""
    with (
        connect(url, admin=True, admin_key_file=admin_key_file) as client,
        client.stream("GET", f"/admin/sessions{_part(name)}/file") as response,
    ):
        if response.is_error:
            response.read()
        raise_for_error(response)
        num_bytes = _write_new(file, response.iter_bytes(_CHUNK_BYTES))
    typer.echo(f"{file}: {_mib(num_bytes)}")


@session.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A session's file.")],
    name: Annotated[str | None, typer.Option(help="Under which name. Default: the file's.")] = None,
    replace: Replace = False,
    url: Url = DEFAULT_URL,
    admin_key_file: KeyFile = None,
) -> None:
    """Keep a session's file in a server, which refuses it unless it has the same model and artifact."""
    name = name or file.name.partition(".")[0]
    try:
        with open(file, "rb") as content, connect(url, admin=True, admin_key_file=admin_key_file) as client:
            size = {"content-length": str(os.fstat(content.fileno()).st_size)}
            pieces = iter(lambda: content.read(_CHUNK_BYTES), b"")
            path = f"/admin/sessions{_part(name)}/file"
            response = client.put(path, params={"replace": replace}, content=pieces, headers=size, timeout=600)
            raise_for_error(response)
            found = response.json()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    typer.echo(f"{name}: {found['tokens']:,} tokens; load it with: vecinfer session restore {name}")


@session.command("delete")
def delete(name: Name, url: Url = DEFAULT_URL, admin_key_file: KeyFile = None) -> None:
    """Delete a saved session."""
    _asked(url, admin_key_file, "DELETE", _part(name))
    typer.echo(f"{name} is deleted")


def _asked(url: str, key_file: Path | None, method: str, path: str, **request: Any) -> dict[str, Any]:
    with connect(url, admin=True, admin_key_file=key_file) as client:
        response = client.request(method, f"/admin/sessions{path}", **request)
        raise_for_error(response)
        found: dict[str, Any] = response.json()
        return found


def _part(name: str) -> str:
    return f"/{quote(name, safe='')}"


def _write_new(path: Path, pieces: Iterator[bytes]) -> int:
    """Write a file that is not there yet, for its owner only, whole or not at all; its bytes."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    try:
        with file:
            return sum(map(file.write, pieces))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> Any:
    try:
        given = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(given, list) and not (isinstance(given, dict) and "messages" in given):
        raise ConfigError(f"{path}: a list of messages, or an object with 'messages', is wanted")
    return given


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
