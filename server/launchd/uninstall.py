"""Remove the daemon, and what it kept if that is asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServiceError
from server.launchd.install import Say, require_mac_and_root
from server.launchd.machine import Machine
from server.launchd.places import SERVER_LABEL, WIRED_LABEL, Places
from server.launchd.steps import RemoveFile, Step, Unload


@dataclass(frozen=True)
class RemoveOwn:
    """Remove what `install` made under a prefix, and the prefix if nothing else is in it."""

    places: Places

    def describe(self) -> str:
        return "\n".join(f"remove {path}" for path in self._own)

    def take(self, machine: Machine) -> None:
        """Remove them; things of others stay."""
        try:
            for path in self._own:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if self.places.prefix.is_dir() and not any(self.places.prefix.iterdir()):
                self.places.prefix.rmdir()
        except OSError as error:
            raise ServiceError(f"cannot remove {error.filename}: {error.strerror or error}") from error

    @property
    def _own(self) -> tuple[Path, ...]:
        places = self.places
        return (places.config, places.key, places.data, places.logs)


def uninstall_steps(places: Places, *, purge: bool) -> tuple[Step, ...]:
    """What removing takes; without `purge`, settings, key, models, artifacts and logs stay."""
    steps: list[Step] = []
    for label in (SERVER_LABEL, WIRED_LABEL):
        steps += [Unload(label), RemoveFile(places.plist(label))]
    return (*steps, RemoveOwn(places)) if purge else tuple(steps)


def uninstall(places: Places, machine: Machine, say: Say, *, purge: bool) -> None:
    """Unload and remove; harmless when nothing is installed.

    Raises:
        ServiceError: not a Mac, not root, or a daemon that does not end.
    """
    require_mac_and_root(machine, "uninstall")
    had_wired_limit = places.plist(WIRED_LABEL).exists()
    for step in uninstall_steps(places, purge=purge):
        step.take(machine)
    kept = "" if purge else f"; settings, models and logs stay in {places.prefix}"
    say(f"the daemon is removed{kept}")
    if had_wired_limit:
        say("the wired-memory limit stays in force until the next boot")
