"""The memory of self-tests: verdicts.json under the data directory, one entry per machine, versions and geometry.

A kernel is noted there before it is tried: one that takes the process with it twice is not tried a third time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant_core.proof.selftest import KernelVerdict
from server.system.json_file import read_object

log = logging.getLogger(__name__)

VERDICTS_FILE = "verdicts.json"
MAX_ATTEMPTS = 2


@dataclass(frozen=True)
class Verdict:
    """The self-test's result.

    Attributes:
        backend: metal, cuda or reference.
        kernels: one per kernel of the back end; none for the reference.
        geometries: what was tested.
        tested_at: UTC, ISO 8601.
    """

    backend: str
    kernels: tuple[KernelVerdict, ...]
    geometries: tuple[str, ...]
    tested_at: str

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Kernels that must not run."""
        return tuple(k.kernel for k in self.kernels if not k.passed)


class VerdictBook:
    """The entry of one key in verdicts.json: attempts under way, and the verdict when there is one.

    Written by one server at a time; a file that cannot be read counts as empty, since the test can be made again.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    def read(self) -> Verdict | None:
        """The verdict, if the test was completed."""
        entry = self._entry().get("verdict")
        return None if entry is None else _verdict(entry)

    def begin(self, kernel: str) -> int:
        """Note that `kernel` is about to be tried; the number of tries now, this one included."""
        attempts = self._attempts()
        attempts[kernel] = attempts.get(kernel, 0) + 1
        self._save({"attempts": attempts})
        return attempts[kernel]

    def end(self, kernel: str) -> None:
        """The process outlived `kernel`, unless it was not tried at all."""
        attempts = self._attempts()
        if attempts.get(kernel, 0) <= MAX_ATTEMPTS:
            attempts.pop(kernel, None)
        self._save({"attempts": attempts})

    def clear(self) -> None:
        """Forget everything, crashes too."""
        self._save({})

    def write(self, verdict: Verdict) -> None:
        """Keep the verdict in the place of the attempts."""
        self._save({"verdict": asdict(verdict)})

    def _attempts(self) -> dict[str, int]:
        found = self._entry().get("attempts")
        return {k: v for k, v in found.items() if isinstance(v, int)} if isinstance(found, dict) else {}

    def _entry(self) -> Mapping[str, Any]:
        entry = self._all().get(self._key, {})
        return entry if isinstance(entry, dict) else {}

    def _all(self) -> dict[str, Any]:
        try:
            return read_object(self._path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read, the kernels are tested anew: %s", self._path, error)
            return {}

    def _save(self, entry: Mapping[str, Any]) -> None:
        try:
            self._write({**self._all(), self._key: entry})
        except OSError as error:
            log.warning("%s cannot be written; the kernels are tested again at the next start: %s", self._path, error)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with scratch.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())  # a GPU fault may take the whole machine with it
            os.replace(scratch, self._path)
        finally:
            scratch.unlink(missing_ok=True)


def known_verdicts(path: Path) -> list[Verdict]:
    """All completed self-tests in a verdicts.json, the latest first; empty where the file cannot be read."""
    try:
        entries = [e for e in read_object(path).values() if isinstance(e, dict)]
    except (OSError, ValueError):
        return []
    found = [_verdict(e["verdict"]) for e in entries if isinstance(e.get("verdict"), dict)]
    return sorted((v for v in found if v is not None), key=lambda v: v.tested_at, reverse=True)


def _verdict(entry: Mapping[str, Any]) -> Verdict | None:
    try:
        kernels = tuple(KernelVerdict(**k) for k in entry["kernels"])
        return Verdict(str(entry["backend"]), kernels, tuple(entry["geometries"]), str(entry["tested_at"]))
    except (KeyError, TypeError):
        return None  # written by another version
