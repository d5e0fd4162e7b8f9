"""`vecinfer`: the command line. Commands live in server/commands, one module each.

A command module has `register(app: typer.Typer) -> None`, and imports what is slow or optional inside its functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from quant_core.errors import QuantError
from server.errors import ServerError

COMMANDS = (
    "serve", "open", "chat", "model", "calibrate", "status", "prefixes", "session", "eval", "bench", "doctor", "plan",
    "service",
)  # fmt: skip


class _Group(TyperGroup):
    """Prints the project's own errors as one line; --debug lets the traceback through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ServerError, QuantError) as error:
            if ctx.params.get("debug"):
                raise
            _complain(str(error))
            raise typer.Exit(1) from error
        except ImportError as error:
            # On Linux MLX comes without the library that does the work, or does not come at all.
            missing = (error.name or "").partition(".")[0] == "mlx" or "libmlx" in str(error)
            if ctx.params.get("debug") or not missing:
                raise
            from server.system.installation import backend_remedy

            _complain(backend_remedy())
            raise typer.Exit(1) from error


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def build_app() -> typer.Typer:
    """The application with every command module that is here; one that does not import says so when it is called."""
    app = typer.Typer(
        cls=_Group,
        name="vecinfer",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=(
            "An OpenAI-compatible inference server whose KV cache is vector-quantised to 1-4 bits, really packed.\n\n"
            "First steps: [bold]vecinfer serve --model demo[/], then in another terminal [bold]vecinfer chat[/]."
        ),
        rich_markup_mode="rich",
    )
    app.callback()(_options)
    for name in COMMANDS:
        if importlib.util.find_spec(f"server.commands.{name}") is not None:
            _register(app, name)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from server.system.version import version_line

        typer.echo(version_line())
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print version and commit, and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options before the command; `debug` is read by `_Group`."""


def _register(app: typer.Typer, name: str) -> None:
    try:
        importlib.import_module(f"server.commands.{name}").register(app)
    except ImportError as error:
        reason = f"`vecinfer {name}` cannot run here: {error}"
        any_options = {"ignore_unknown_options": True, "allow_extra_args": True}

        @app.command(name, help=f"Not available: {error}", context_settings=any_options)
        def unavailable() -> None:
            Console(stderr=True, soft_wrap=True).print(reason, markup=False, highlight=False)
            raise typer.Exit(1)


def main() -> None:
    """Entry point of `vecinfer`."""
    build_app()()


if __name__ == "__main__":
    main()
