"""Where a fast BLAS is found, on file systems made up for the test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from server.cli import build_app
from server.config import BLAS_GUARD
from server.model import blas

DEBIAN = "usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0"


def _put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _find(root: Path, cache: str = "") -> str | None:
    found = blas.find_blas(root, prefix=root / "venv", cache=cache)
    return None if found is None else found.relative_to(root).as_posix()


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([], None),
        (["usr/lib/x86_64-linux-gnu/libblas.so.3"], None),
        ([DEBIAN, "usr/lib/x86_64-linux-gnu/libopenblas.so.0"], DEBIAN),
        (["usr/lib/aarch64-linux-gnu/openblas-pthread/libopenblas.so.0"],) * 2,
        (["usr/lib64/libopenblas.so.0", "usr/lib64/libopenblasp.so.0"], "usr/lib64/libopenblasp.so.0"),
        (["usr/lib/libopenblas.so"], "usr/lib/libopenblas.so"),
        (["opt/OpenBLAS/lib/libopenblas.so.0"], "opt/OpenBLAS/lib/libopenblas.so.0"),
        (["venv/lib/libmkl_rt.so.2"], "venv/lib/libmkl_rt.so.2"),
        (["venv/lib/libmkl_rt.so.2", DEBIAN], DEBIAN),
    ],
)
def test_usual_places(present: list[str], expected: str | list[str] | None, tmp_path: Path) -> None:
    _put(tmp_path, *present)
    assert _find(tmp_path) == (expected[0] if isinstance(expected, list) else expected)


def test_the_linkers_cache_knows_unusual_places(tmp_path: Path) -> None:
    _put(tmp_path, "odd/libopenblas.so.0", "odd/libopenblasp.so.0")
    cache = "".join(
        f"\t{name} (libc6,x86-64) => {tmp_path}/odd/{name}\n"
        for name in ("libopenblas.so.0", "libopenblasp.so.0", "libblas.so.3")
    )
    assert _find(tmp_path, cache) == "odd/libopenblasp.so.0"


def test_a_stale_cache_entry_is_not_believed(tmp_path: Path) -> None:
    assert _find(tmp_path, f"\tlibopenblas.so.0 (libc6,x86-64) => {tmp_path}/gone/libopenblas.so.0\n") is None


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Environments of restarts that would have happened, from a process that needs one."""
    started: list[dict[str, str]] = []

    def execve(_program: str, _arguments: list[str], environment: dict[str, str]) -> None:
        started.append(environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    for variable in ("LD_PRELOAD", "VECINFER_BLAS", BLAS_GUARD):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(blas, "find_blas", lambda: Path("/somewhere/libopenblas.so.0"))
    return started


def _fail(line: str) -> None:
    pytest.fail(line)


def test_restarts_once_and_keeps_other_preloads(
    restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so")
    blas.ensure_fast_blas(_fail)
    assert [r["LD_PRELOAD"] for r in restarts] == ["/somewhere/libopenblas.so.0:/usr/lib/libjemalloc.so"]
    monkeypatch.setenv(BLAS_GUARD, restarts[0][BLAS_GUARD])
    blas.ensure_fast_blas(_fail)
    assert len(restarts) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VECINFER_BLAS", "off"), ("LD_PRELOAD", "/x/libopenblas.so.0"), ("LD_PRELOAD", "libmkl_rt.so")],
)
def test_leaves_alone(
    variable: str, value: str, restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    blas.ensure_fast_blas(_fail)
    assert not restarts


def test_a_gpu_or_a_mac_needs_none(restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    blas.ensure_fast_blas(_fail)
    monkeypatch.setattr(sys, "platform", "darwin")
    blas.ensure_fast_blas(_fail)
    assert not restarts


def test_none_found_is_said_with_the_remedy(restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "find_blas", lambda: None)
    said: list[Any] = []
    blas.ensure_fast_blas(said.append)
    assert len(said) == 1
    assert blas.REMEDY in said[0]
    assert not restarts


class _Reached(Exception):
    """ensure_fast_blas was called."""


@pytest.mark.parametrize(
    "command",
    [
        "serve", "calibrate --local", "doctor", "eval --text nowhere.txt", "bench attention", "bench encode",
        "bench decode", "bench prefill",
    ],
)  # fmt: skip
def test_every_command_that_computes_asks_for_it(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def reached(_: object) -> None:
        raise _Reached

    monkeypatch.setattr(blas, "ensure_fast_blas", reached)
    assert isinstance(CliRunner().invoke(build_app(), command.split()).exception, _Reached)
