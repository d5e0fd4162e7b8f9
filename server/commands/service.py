"""`vecinfer service`: run the server as a daemon of a Mac, from boot on, with nobody logged in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.launchd.places import Places

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Run the server as a launchd daemon: from boot on, with nobody logged in (macOS).\n\n"
        "See what it would do first: [bold]vecinfer service install --dry-run[/]"
    ),
)

_Prefix = Annotated[
    Path | None,
    typer.Option(help="Folder of settings, key, models and logs. Default: /Library/Application Support/VecInfer."),
]


def register(parent: typer.Typer) -> None:
    """Add `vecinfer service`."""
    parent.add_typer(app, name="service")


@app.command()
def install(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A config.yaml to start from. Default: the installed one.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="demo, a folder, or a Hugging Face name.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for the network.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="Port to listen on.")] = None,
    user: Annotated[
        str | None, typer.Option(help="Account to run as. Default: the owner of this Python environment.")
    ] = None,
    prefix: _Prefix = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask Hugging Face (HF_HUB_OFFLINE=1).")] = False,
    wired_limit_mb: Annotated[
        int | None,
        typer.Option(min=1024, help="Also set iogpu.wired_limit_mb at every boot. Too high freezes the machine."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print everything it would write and run; works on any system.")
    ] = False,
) -> None:
    """Install and start the daemon, or bring an installed one up to date.

    Settings and key of an earlier installation stay; options given here win over them.

    Example: sudo vecinfer service install --model mlx-community/Qwen3-8B-4bit --port 8080
    """
    from server.launchd.install import InstallOptions, plan_install, require_mac_and_root
    from server.launchd.install import install as run_install
    from server.launchd.machine import Machine

    machine = Machine()
    if not dry_run:
        require_mac_and_root(machine, "install")
    options = InstallOptions(
        places=_places(prefix),
        user=user,
        source=config,
        changes={"model.name": model, "http.host": host, "http.port": port},
        offline=offline,
        wired_limit_mb=wired_limit_mb,
    )
    plan = plan_install(options, machine)
    if dry_run:
        typer.echo(plan.describe())
    else:
        run_install(plan, machine, typer.echo)


@app.command()
def uninstall(
    purge: Annotated[
        bool, typer.Option("--purge", help="Also remove settings, key, models, artifacts and logs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --purge.")] = False,
    prefix: _Prefix = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would do.")] = False,
) -> None:
    """Stop the daemon after its running requests, and remove it; data stays without --purge."""
    from server.launchd.install import require_mac_and_root
    from server.launchd.machine import Machine
    from server.launchd.uninstall import uninstall as run_uninstall
    from server.launchd.uninstall import uninstall_steps

    places = _places(prefix)
    if dry_run:
        typer.echo("\n".join(step.describe() for step in uninstall_steps(places, purge=purge)))
        return
    machine = Machine()
    require_mac_and_root(machine, "uninstall")
    if purge and not yes:
        typer.confirm(f"Remove all models, artifacts, settings and logs in {places.prefix}?", abort=True)
    run_uninstall(places, machine, typer.echo, purge=purge)


@app.command()
def status() -> None:
    """Say what launchd and the server report. Exit code: 0 ready, 1 running but not ready, 3 not running."""
    from server.launchd.machine import Machine
    from server.launchd.places import Places
    from server.launchd.status import service_status

    machine = Machine()
    _require_mac(machine.is_macos, "status")
    found = service_status(Places(), machine)
    typer.echo("\n".join(found.lines()))
    raise typer.Exit(found.exit_code)


@app.command()
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    startup: Annotated[
        bool, typer.Option("--startup", help="What launchd caught instead: failures to start, crashes.")
    ] = False,
) -> None:
    """Show the end of the daemon's log, which the server rotates itself."""
    from server.launchd.machine import Machine
    from server.launchd.tail import follow as new_lines
    from server.launchd.tail import log_lines

    machine = Machine()
    _require_mac(machine.is_macos, "logs")
    path = _log_path(startup)
    for line in log_lines(path, lines):
        typer.echo(line)
    if follow:
        try:
            for line in new_lines(path, machine.sleep):
                typer.echo(line)
        except KeyboardInterrupt:
            raise typer.Exit from None


def _places(prefix: Path | None) -> Places:
    """The given prefix, else that of the installed daemon, else the usual one."""
    from server.errors import ServiceError
    from server.launchd.places import SERVER_LABEL, Places
    from server.launchd.plist import read_installed

    if prefix is not None:
        return Places(prefix.expanduser().absolute())
    try:
        found = read_installed(Places().plist(SERVER_LABEL))
    except ServiceError:  # unreadable: both actions replace or remove it
        found = None
    return Places() if found is None else Places(found.config.parent)


def _log_path(startup: bool) -> Path:
    from server.config import load_config
    from server.errors import ServiceError
    from server.launchd.places import SERVER_LABEL, Places
    from server.launchd.plist import read_installed

    found = read_installed(Places().plist(SERVER_LABEL))
    if found is None:
        raise ServiceError("the daemon is not installed: `sudo vecinfer service install`")
    path = found.err if startup else load_config(found.config).log.file
    if path is None:
        raise ServiceError(f"{found.config} has no log.file; set it, or use --startup")
    return path


def _require_mac(is_macos: bool, action: str) -> None:
    from server.errors import ServiceError

    if not is_macos:
        raise ServiceError(f"`vecinfer service {action}` needs macOS and its launchd")
