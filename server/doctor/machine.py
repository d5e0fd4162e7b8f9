"""What this machine is: the facts a self-test's verdict depends on, and those a person asks for first."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata, resources

import mlx.core as mx
import psutil

from quant_core.backends.choose import resolve_backend

_PROGRAM_TIMEOUT_S = 10


@dataclass(frozen=True)
class MachineFacts:
    """A machine as MLX sees it.

    Attributes:
        chip: the GPU's name, or the processor's where there is no GPU.
        architecture: of the GPU, as its compiler calls it; of the processor otherwise.
        system: name and version of the operating system.
        build: macOS's build, or the NVIDIA driver's version; empty elsewhere.
        memory_bytes: of the machine.
        working_set_bytes: what Metal recommends for the GPU, or the GPU's own memory; None without a GPU.
        backend: metal, cuda or reference: what `auto` takes here.
        mlx, mlx_lm: versions.
    """

    chip: str
    architecture: str
    system: str
    build: str
    memory_bytes: int
    working_set_bytes: int | None
    backend: str
    mlx: str
    mlx_lm: str

    def versions(self) -> dict[str, str]:
        """What a kernel's compilation and result may depend on."""
        return {k: v for k, v in asdict(self).items() if isinstance(v, str)}


@lru_cache(maxsize=1)
def this_machine() -> MachineFacts:
    """The facts, asked for once."""
    info, backend = mx.device_info(), resolve_backend("auto")
    working_set = info.get("max_recommended_working_set_size", info.get("total_memory"))
    return MachineFacts(
        chip=str(info.get("device_name") or platform.processor() or "unknown"),
        architecture=str(info.get("architecture", platform.machine())),
        system=_system(),
        build=_build(backend),
        memory_bytes=int(psutil.virtual_memory().total),
        working_set_bytes=None if backend == "reference" or working_set is None else int(working_set),
        backend=backend,
        mlx=metadata.version("mlx"),
        mlx_lm=metadata.version("mlx-lm"),
    )


def kernel_hash() -> str:
    """Hash of the kernels' text and of the code that launches them."""
    digest = hashlib.sha256()
    for package in ("metal_shaders", "quant_core.backends"):
        root = resources.files(package)
        for path in sorted(_files(root), key=str):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _files(folder: resources.abc.Traversable) -> list[resources.abc.Traversable]:
    found: list[resources.abc.Traversable] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += [] if entry.name == "__pycache__" else _files(entry)
        elif not entry.name.endswith(".pyc"):
            found.append(entry)
    return found


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _build(backend: str) -> str:
    if platform.system() == "Darwin":
        return _output("sw_vers", "-buildVersion")
    if backend == "cuda":
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ""


def _output(*command: str) -> str:
    """First line of a program's output; empty when it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]
