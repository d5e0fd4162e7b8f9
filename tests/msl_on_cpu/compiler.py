"""Kernel text through clang: the address-space type check, and an instrumented shared object (cached by content)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from tests.msl_on_cpu.text import KernelFault, translation_unit

HERE = Path(__file__).parent
CLANG = "clang++-19"
WARNINGS = [
    "-Wno-unknown-attributes", "-Wno-user-defined-literals", "-Wno-duplicate-decl-specifier", "-Wno-unused-value",
    "-Wno-ignored-attributes", "-Wno-c++20-extensions", "-Wno-c++17-extensions", "-Wno-c++14-extensions",
]  # fmt: skip
UNDEFINED_CHECKS = (
    "alignment,array-bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,null,bool,"
    "unreachable,return"
)
FLOATING_POINT = {
    "precise": ["-ffp-contract=off"],
    "contract": ["-ffp-contract=fast", "-mfma"],
    "fast": ["-ffast-math", "-mfma"],
}
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-vectorize", "-fno-slp-vectorize", "-fno-strict-aliasing",
    "-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none",
    "-ftrivial-auto-var-init=pattern", "-fno-exceptions", "-fno-rtti",
    f"-fsanitize=thread,{UNDEFINED_CHECKS}", "-fsanitize-recover=all", "-mllvm", "-tsan-instrument-func-entry-exit=0",
]  # fmt: skip


def available() -> bool:
    """Whether the compiler is installed."""
    return shutil.which(CLANG) is not None


def cache_dir() -> Path:
    """Where compiled kernels are kept; safe to delete."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vecinfer-msl-on-cpu"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / "vecinfer-msl-on-cpu"
        root.mkdir(parents=True, exist_ok=True)
    return root


def mlx_include() -> Path:
    """MLX's own headers, as installed."""
    return Path(mx.__file__).parent / "include"


@lru_cache(maxsize=1)
def _stamp() -> str:
    """Changes whenever the shim or the runtime does."""
    digest = hashlib.sha256(version("mlx").encode())
    for path in sorted([*HERE.glob("include/**/*"), *HERE.glob("runtime/*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _built(name: str, build: list[str]) -> Path:
    """Run the compiler command `build + ["-o", <temporary>]` and move the result to the cache under `name`."""
    target = cache_dir() / name
    if not target.exists():
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([*build, "-o", str(temporary)], capture_output=True, text=True)
        if done.returncode:
            raise KernelFault(done.stderr[:4000])
        os.replace(temporary, target)
    return target


@lru_cache(maxsize=1)
def runtime() -> ctypes.CDLL:
    """The fiber runtime, built once."""
    sources = [str(p) for p in sorted((HERE / "runtime").glob("*.cpp"))]
    built = _built(f"runtime-{_stamp()}.so", [CLANG, "-std=c++17", "-O2", "-g1", "-fPIC", "-shared", *sources])
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


@lru_cache(maxsize=1)
def _check_include() -> Path:
    """MLX's utils.h has `constant const int64_t strides[2]` parameters, which clang's plain C++ mode refuses."""
    folder = cache_dir() / f"include-{_stamp()}" / "mlx/backend/metal/kernels"
    folder.mkdir(parents=True, exist_ok=True)
    text = (mlx_include() / "mlx/backend/metal/kernels/utils.h").read_text()
    (folder / "utils.h").write_text(re.sub(r"strides\[[23]\]\)", "* strides)", text))
    return cache_dir() / f"include-{_stamp()}"


def typecheck(source: str, function: str, template: str) -> list[str]:
    """Diagnostics of a compile with device, constant and threadgroup as address spaces. Cached when clean."""
    text = translation_unit(source, function, template, executable=False)
    passed = cache_dir() / f"checked-{hashlib.sha256((_stamp() + text).encode()).hexdigest()[:24]}"
    if passed.exists():
        return []
    includes = [f"-I{p}" for p in (HERE / "include", _check_include(), mlx_include())]
    done = subprocess.run(
        [CLANG, "-x", "c++", "-std=c++14", "-DMSL_CHECK", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-parameter",
         "-Wno-unused-variable", "-Wno-unused-function", "-Wno-sign-compare", *WARNINGS, *includes, "-"],
        input=text, capture_output=True, text=True,
    )  # fmt: skip
    found = [line for line in done.stderr.splitlines() if re.match(r".*:\d+:\d+: (error|warning|fatal)", line)]
    if not found:
        passed.touch()
    return found


def compile_kernel(source: str, function: str, template: str, fp: str, defines: tuple[str, ...] = ()) -> Path:
    """The kernel as an instrumented shared object with an entry point."""
    text = translation_unit(source, function, template, executable=True)
    flags = [*FLAGS, *FLOATING_POINT[fp], *WARNINGS, *(f"-D{d}" for d in defines)]
    key = hashlib.sha256((_stamp() + text + " ".join(flags)).encode()).hexdigest()[:24]
    target = f"kernel-{key}.so"
    if (cache_dir() / target).exists():
        return cache_dir() / target
    source_file = cache_dir() / f"kernel-{key}.cpp"
    source_file.write_text(text)
    includes = [f"-I{HERE / 'include'}", f"-I{mlx_include()}"]
    built = _built(f"kernel-{key}.o", [CLANG, *flags, *includes, "-c", str(source_file)])
    shared = _built(target, [CLANG, "-shared", str(built), "--rtlib=compiler-rt", "-lm"])
    built.unlink(missing_ok=True)
    return shared
