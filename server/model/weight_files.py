"""Whether the files of a model's weights are what they should be: their sizes always, their hashes where known.

A bit that flipped on the disk changes answers and nothing else. Hashes are known of files that huggingface_hub fetched
and of the demo model. A file is hashed once: size and time of its last change are remembered with the hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from server.errors import ModelError
from server.model.wheel import Report
from server.system.json_file import parse_json, read_object

WEIGHT_FILES = "model*.safetensors"
# What the demo's conversion leaves beside the weights: {file name: SHA-256}.
CHECKSUMS_FILE = "checksums.json"
# In the data directory: {path: [bytes, nanoseconds of the last change, SHA-256]}.
VERIFIED_FILE = "verified_weights.json"
MAX_HASHED_AT_ONCE = 4
REPORT_S = 0.2
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that hold its weights."""
    return sorted(file for file in folder.glob(WEIGHT_FILES) if file.is_file())


def check_weight_files(folder: Path, data_dir: Path, report: Report) -> None:
    """Check every weight file in a model folder.

    Args:
        data_dir: where it is remembered what was hashed.
        report: called with a line and the fraction done while files are hashed.

    Raises:
        ModelError: a file is cut, or not what was fetched; the message names it and the remedy.
    """
    verified, expected = _Verified(data_dir / VERIFIED_FILE), dict[Path, str]()
    for file in weight_files(folder):
        _check_size(file)
        known = known_sha256(file)
        if known is not None and not verified.has(file, known):
            expected[file] = known
    try:
        hashed = _hashed(list(expected), report)
    except OSError as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
    for file, got in hashed.items():
        if got != expected[file]:
            raise ModelError(
                f"{file} is damaged: its SHA-256 is {got}, that of what was written there is {expected[file]}; "
                f"delete {file.resolve()} and fetch the model again"
            )
        verified.add(file, expected[file])


def record_checksums(folder: Path) -> None:
    """Write the hashes of the weight files in `folder` beside them."""
    found = {file.name: sha256 for file, sha256 in _hashed(weight_files(folder), lambda line, fraction: None).items()}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def known_sha256(file: Path) -> str | None:
    """What the hub's cache, the hub's download folder or our own conversion says of a file; None: nothing."""
    if file.is_symlink() and file.resolve().parent.name == "blobs" and _SHA256.fullmatch(file.resolve().name):
        return file.resolve().name
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        # Commit, ETag (of large files their SHA-256) and time; a file that was changed since is not the hub's any more.
        _, etag, fetched_s = metadata.read_text().splitlines()
        if _SHA256.fullmatch(etag) and file.stat().st_mtime <= float(fetched_s) + 1:
            return etag
    except (OSError, ValueError):
        pass
    try:
        return str(read_object(file.parent / CHECKSUMS_FILE)[file.name])
    except (OSError, ValueError, KeyError):
        return None


def _check_size(file: Path) -> None:
    """Raise ModelError where a file is not as long as its header says; an unreadable header is the loader's to name."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(_HEADER_BYTES), "little")
            if not 0 < header_bytes <= min(size, _MAX_HEADER_BYTES):
                return
            header = parse_json(opened.read(header_bytes))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = _HEADER_BYTES + header_bytes + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return
    if size != expected:
        raise ModelError(
            f"{file} has {size:,} bytes and should have {expected:,}: it was cut off or written over; "
            f"delete {file.resolve()} and fetch the model again"
        )


def _hashed(files: Sequence[Path], report: Report) -> dict[Path, str]:
    """SHA-256 of each file, a few at a time: hashing takes a core, and holds no lock of Python's meanwhile."""
    total, done = max(1, sum(file.stat().st_size for file in files)), [0] * len(files)
    line = f"checking {files[0].name}" if len(files) == 1 else f"checking {len(files)} weight files"
    if files:
        report(line, 0.0)

    def count(number: int, num_bytes: int) -> None:
        done[number] += num_bytes

    with ThreadPoolExecutor(MAX_HASHED_AT_ONCE, thread_name_prefix="sha256") as threads:
        futures = [threads.submit(_sha256, file, partial(count, number)) for number, file in enumerate(files)]
        while wait(futures, REPORT_S).not_done:
            report(line, sum(done) / total)
        return {file: future.result() for file, future in zip(files, futures, strict=True)}


def _sha256(file: Path, count: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(8 << 20):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


class _Verified:
    """What was hashed before. A file of it that cannot be read or written costs a hash at each start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._files: dict[str, object] = read_object(path)
        except (OSError, ValueError):
            self._files = {}

    def has(self, file: Path, sha256: str) -> bool:
        """Whether this very file had this hash."""
        return self._files.get(str(file.resolve())) == self._mark(file, sha256)

    def add(self, file: Path, sha256: str) -> None:
        """Remember it, if the disk takes it."""
        self._files = {path: mark for path, mark in self._files.items() if Path(path).exists()}
        self._files[str(file.resolve())] = self._mark(file, sha256)
        scratch = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self._files, indent=1), encoding="utf-8")
            os.replace(scratch, self._path)

    @staticmethod
    def _mark(file: Path, sha256: str) -> list[object]:
        stat = file.stat()
        return [stat.st_size, stat.st_mtime_ns, sha256]
