"""Which version this is: the package's number, and the commit it was made from."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = "vecinfer-server"
_ROOT = Path(__file__).parents[2]
# Written into wheel and source distribution by deploy/build_commands.py.
_COMMIT_FILE = _ROOT / "server" / "commit.txt"


def package_version() -> str:
    """The installed package's number; "unknown" in a copy of the sources that was never installed."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """The commit: as built in, as pip noted it, or of the clone that this runs from; None: not known."""
    try:
        return _COMMIT_FILE.read_text(encoding="ascii").strip() or None
    except OSError:
        return _noted_commit() or (git_commit(_ROOT) if (_ROOT / ".git").exists() else None)


def _noted_commit() -> str | None:
    """What PEP 610's direct_url.json says of an installation from a repository."""
    try:
        text = metadata.distribution(PACKAGE).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    noted = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    return str(noted)[:12] if noted else None


def git_commit(folder: Path) -> str | None:
    """The commit of a clone, with "+" after it if tracked files differ; None without git."""
    try:
        text = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip() or None


def version_line() -> str:
    """What `vecinfer --version` prints."""
    known = commit()
    return f"{PACKAGE} {package_version()}" + (f" (commit {known})" if known else "")
