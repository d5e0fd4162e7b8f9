"""`vecinfer open`: the server's page in the browser, logged in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.terminal.client import DEFAULT_URL, connect, raise_for_error


def register(app: typer.Typer) -> None:
    """Add `vecinfer open`."""
    app.command("open")(open_page)


def open_page(
    url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    admin_key_file: Annotated[Path | None, typer.Option(help="A file with the server's admin key.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the link instead of opening a browser.")] = False,
) -> None:
    """Open the page of a running server: what it does, a chat, codecs, its health.

    The link logs one browser in, once, within two minutes; after that the address holds nothing secret. The key of a
    server of this account on this machine is found by itself; else give --admin-key-file or $VECINFER_ADMIN_KEY.
    """
    import webbrowser

    base = url.rstrip("/").removesuffix("/v1")
    with connect(base, admin=True, admin_key_file=admin_key_file) as client:
        response = client.post("/admin/page-links")
        raise_for_error(response)
        # After the hash it is told to no server and to no log.
        link = f"{base}/#link={response.json()['link']}"
    if print_only or not webbrowser.open(link):
        typer.echo(link)
