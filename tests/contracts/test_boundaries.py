"""Imports flow server -> quant_core -> metal_shaders; one reader of the environment; one launcher of kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "quant_core", "metal_shaders")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# What each package must not import: the packages above it, and for the mathematics everything about time and requests.
FORBIDDEN = {
    "server": {"tests"},
    "quant_core": {"tests", "server", "fastapi", "starlette", "uvicorn", "asyncio", "threading", "concurrent", "httpx"},
    "metal_shaders": {"tests", "server", "quant_core", "mlx", "mlx_lm"},
}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}
LAUNCHERS = {"metal_kernel", "cuda_kernel", "precompiled_cuda_kernel"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names of everything imported, lazily inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package, so that arrows can be read"
            yield (node.module or "").partition(".")[0]


def _names_used(tree: ast.Module) -> set[str]:
    """Attributes read and names imported: `os.environ` and `from os import environ` both give "environ"."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return used | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_never_point_back(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not set(_imports(_tree(path))) & FORBIDDEN[package]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_the_configuration_reads_the_environment(path: Path) -> None:
    tree = _tree(path)
    found = _names_used(tree) & ENVIRONMENT
    found |= {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "envvar"}
    assert not found or _name(path) == "server/config.py"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_back_ends_launch_kernels(path: Path) -> None:
    assert not _names_used(_tree(path)) & LAUNCHERS or _name(path).startswith("quant_core/backends/")


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse("def f():\n    from os import environ\n    import server.http.app\n    mx.fast.metal_kernel()\n")
    assert set(_imports(tree)) == {"os", "server"}
    assert _names_used(tree) >= {"environ", "metal_kernel"}
