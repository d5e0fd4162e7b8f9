"""Run a compiled kernel on the fiber runtime: poisoned outputs, shadowed buffers, a chosen thread order."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.msl_on_cpu.compiler import runtime

Array = np.ndarray[Any, Any]

THREADGROUP_LIMIT_BYTES = 32768
MAX_THREADS = 1024
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_CONST_INPUT, _OUTPUT, _THREADGROUP = 0, 1, 2


class _Buffer(ctypes.Structure):
    """msl_buf of runtime/abi.h."""

    _fields_ = [
        ("base", ctypes.c_void_p), ("size", ctypes.c_uint64), ("kind", ctypes.c_uint32), ("init", ctypes.c_uint32),
        ("name", ctypes.c_char_p), ("read_bytes", ctypes.c_uint64), ("written_bytes", ctypes.c_uint64),
        ("read_unique", ctypes.c_uint64), ("written_unique", ctypes.c_uint64),
    ]  # fmt: skip


class _Config(ctypes.Structure):
    """msl_cfg of runtime/abi.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("tg", ctypes.c_uint32 * 3), ("seed", ctypes.c_uint32),
        ("order", ctypes.c_uint32), ("strict_simd", ctypes.c_uint32), ("check", ctypes.c_uint32),
        ("max_reports", ctypes.c_uint32), ("tg_base", ctypes.c_void_p), ("tg_size", ctypes.c_uint64),
        ("pc_base", ctypes.c_uint64), ("rodata", ctypes.c_void_p), ("num_rodata", ctypes.c_uint64),
    ]  # fmt: skip


class _Stats(ctypes.Structure):
    """msl_stats of runtime/abi.h."""

    _fields_ = [
        *((n, ctypes.c_uint64) for n in ("barriers", "simd_ops", "switches", "accesses", "reports", "groups")),
        ("text", ctypes.c_char_p),
    ]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer: its size, summed over accesses, and distinct."""

    size: int
    read_bytes: int
    written_bytes: int
    read_unique: int
    written_unique: int


@dataclass(frozen=True, eq=False)
class Result:
    """What one launch did. `reports` empty: nothing undefined was seen."""

    outputs: list[Array]
    reports: str
    traffic: dict[str, Traffic]
    threadgroup_bytes: int
    stats: dict[str, int]


@dataclass(eq=False)
class Argument:
    """One buffer of a launch; outputs give shape and dtype, `init_value` their contents (None: undefined)."""

    name: str
    array: Array
    is_output: bool = False
    is_defined: bool = True


@dataclass(eq=False)
class LoadedKernel:
    """A kernel's shared object: its entry point, threadgroup variables and constant tables."""

    path: Path
    lib: ctypes.CDLL = field(init=False)
    threadgroup: list[tuple[str, int, int]] = field(init=False, default_factory=list)
    rodata: list[tuple[int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        runtime()
        self.lib = ctypes.CDLL(str(self.path))
        self.lib.msl_tg_base.restype = self.lib.msl_pc_base.restype = ctypes.c_void_p
        self.lib.msl_tg_size.restype = ctypes.c_uint64
        low = self.lib.msl_tg_base() or 0
        high = low + self.lib.msl_tg_size()
        symbols = subprocess.run(
            ["nm", "-SC", "--defined-only", str(self.path)], capture_output=True, text=True, check=True
        ).stdout
        entry = re.search(r"^(\w+) \w+ T msl_entry$", symbols, re.M)
        assert entry is not None
        self._entry_offset = int(entry.group(1), 16)
        slide = self.lib.msl_pc_base() - self._entry_offset
        for m in re.finditer(r"^(\w+) (\w+) [bBdDrRuVvGgSs] (.*)$", symbols, re.M):
            address, size = int(m.group(1), 16) + slide, int(m.group(2), 16)
            if low <= address < high:
                self.threadgroup.append((m.group(3).split("::")[-1], address, size))
            elif size:
                self.rodata.append((address, size))

    @property
    def threadgroup_bytes(self) -> int:
        """Static threadgroup memory, in Apple's 16-byte granules."""
        return sum(-(-size // 16) * 16 for _, _, size in self.threadgroup)

    def symbolize(self, text: str) -> str:
        """Replace `@pc=<offset>` by file and line."""
        offsets = sorted(set(re.findall(r"@pc=([0-9a-f]+)", text)))
        if not offsets:
            return text
        addresses = [hex((self._entry_offset + int(o, 16) - 1) % (1 << 32)) for o in offsets]
        found = subprocess.run(
            ["llvm-symbolizer-19", f"--obj={self.path}", "--no-inlines", "--functions=none", *addresses],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        places = [line for line in found.splitlines() if line.strip()]
        for offset, place in zip(offsets, places, strict=False):
            text = text.replace(f"@pc={offset}", "@" + re.sub(r":\d+$", "", os.path.basename(place)))
        return text

    def run(
        self, arguments: list[Argument], grid: tuple[int, int, int], group: tuple[int, int, int],
        *, order: str, seed: int, strict_simd: bool = True,
    ) -> Result:  # fmt: skip
        """Launch once. Outputs that are not defined start as 0xFF bytes (NaN)."""
        count = len(arguments)
        table = (_Buffer * (count + len(self.threadgroup)))()
        pointers = (ctypes.c_void_p * count)()
        held = [_place(a) for a in arguments]
        for i, (a, (_, view)) in enumerate(zip(arguments, held, strict=True)):
            kind = _OUTPUT if a.is_output else _CONST_INPUT
            table[i] = _Buffer(view.ctypes.data, a.array.nbytes, kind, a.is_defined, a.name.encode())
            pointers[i] = view.ctypes.data
        for i, (name, address, size) in enumerate(self.threadgroup):
            table[count + i] = _Buffer(address, size, _THREADGROUP, 0, f"threadgroup {name}".encode())
        config = self._config(grid, group, order, seed, strict_simd)
        stats = _Stats()
        runtime().msl_launch(
            ctypes.cast(self.lib.msl_entry, ctypes.c_void_p), pointers, ctypes.byref(config), table, len(table),
            ctypes.byref(stats),
        )  # fmt: skip
        reports = self.symbolize((stats.text or b"").decode())
        if self.threadgroup_bytes > THREADGROUP_LIMIT_BYTES:
            reports += f"THREADGROUP MEMORY {self.threadgroup_bytes} > {THREADGROUP_LIMIT_BYTES} bytes\n"
        if group[0] * group[1] * group[2] > MAX_THREADS:
            reports += f"THREADGROUP of {group} threads: more than {MAX_THREADS}\n"
        outputs = [
            view[: a.array.nbytes].view(a.array.dtype).reshape(a.array.shape).copy()
            for a, (_, view) in zip(arguments, held, strict=True)
            if a.is_output
        ]
        traffic = {
            a.name: Traffic(b.size, b.read_bytes, b.written_bytes, b.read_unique, b.written_unique)
            for a, b in zip(arguments, table, strict=False)
        }
        numbers = {name: getattr(stats, name) for name, *_ in _Stats._fields_[:-1]}
        return Result(outputs, reports, traffic, self.threadgroup_bytes, numbers)

    def _config(
        self, grid: tuple[int, int, int], group: tuple[int, int, int], order: str, seed: int, strict_simd: bool
    ) -> _Config:
        config = _Config(seed=seed, order=ORDERS[order], strict_simd=strict_simd, check=1, max_reports=20)
        config.grid[:] = grid
        config.tg[:] = [min(t, g) for t, g in zip(group, grid, strict=True)]
        self._rodata_table = (ctypes.c_uint64 * (2 * max(1, len(self.rodata))))(*[x for r in self.rodata for x in r])
        config.rodata = ctypes.cast(self._rodata_table, ctypes.c_void_p)
        config.num_rodata = len(self.rodata)
        if self.threadgroup:
            config.tg_base, config.tg_size = self.lib.msl_tg_base(), self.lib.msl_tg_size()
        config.pc_base = self.lib.msl_pc_base()
        return config


def _place(argument: Argument) -> tuple[Array, Array]:
    """64-byte aligned copy of an argument with slack on both sides, so that small overruns hit no other buffer."""
    contents = np.ascontiguousarray(argument.array)
    size = max(contents.nbytes, 1)
    raw = np.empty(size + 64 + 256, np.uint8)
    offset = (-raw.ctypes.data) % 64 + 128
    view = raw[offset : offset + size]
    if argument.is_defined:
        view[: contents.nbytes] = contents.reshape(-1).view(np.uint8)
    else:
        view[:] = 0xFF
    return raw, view
