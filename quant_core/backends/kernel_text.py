"""Kernel text: the manifest, the assembly of header and body, and the retarget that makes CUDA of it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

from quant_core.codec.spec import PAGE_SIZE

Dialect = Literal["metal", "cuda"]

_THREADGROUP_VARIABLE = re.compile(r"([;{}]\s*)threadgroup(\s+[A-Za-z_]\w*\s+[A-Za-z_]\w*\s*(?=[\[;]))")
_ADDRESS_SPACE = re.compile(r"\b(device|constant|threadgroup|thread)\b(?=\s)")


@dataclass(frozen=True)
class KernelSource:
    """One kernel in one dialect, as `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` take it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    source: str


@lru_cache(maxsize=1)
def manifest() -> dict[str, dict[str, object]]:
    """manifest.toml: per kernel its headers, buffers and legal template values; and `variants`, which CI runs."""
    return tomllib.loads(read("manifest.toml"))


def read(path: str) -> str:
    """A file of the metal_shaders package."""
    return resources.files("metal_shaders").joinpath(path).read_text(encoding="utf-8")


def host_numbers() -> str:
    """What the host decides and every kernel's text begins with."""
    return f"#define VQ_PAGE_SIZE {PAGE_SIZE}\n"


def strip_comments(text: str) -> str:
    """`text` without comments, indentation and empty lines.

    MLX looks for attribute names in the whole body, and hashes all of it at every call.
    """
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    return "\n".join(line.strip() for line in code.splitlines() if line.strip()) + "\n"


def retarget(text: str) -> str:
    """MSL to CUDA: threadgroup variables become __shared__, the other address-space words disappear.

    They cannot be macros: nvcc's own __device__ and __constant__ expand to attributes spelled with those words.
    """
    rewritten = ";" + text
    while True:
        step = _THREADGROUP_VARIABLE.sub(r"\1__shared__\2", rewritten)
        if step == rewritten:
            return _ADDRESS_SPACE.sub("", step[1:])
        rewritten = step


@lru_cache(maxsize=64)
def load_kernel(name: str, dialect: Dialect) -> KernelSource:
    """Kernel `name` of the manifest, ready for MLX."""
    entry = manifest()[name]
    headers, inputs, outputs = (_names(entry[key]) for key in ("headers", "inputs", "outputs"))
    header = "\n".join(strip_comments(read(f"include/{h}")) for h in headers)
    body = strip_comments(read(f"kernels/{name}.metal"))
    if dialect == "cuda":
        header, body = retarget(header), retarget(body)
    prelude = host_numbers() + strip_comments(read(f"prelude/{dialect}.h"))
    return KernelSource(name, inputs, outputs, prelude + header, body)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"manifest.toml: a list of names was expected, got {value!r}")
    return tuple(str(v) for v in value)
