"""Folders of a package import one way: no circles, and nothing from a folder above."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of each package, its folders and the modules beside them, from the lowest up: each imports those before it only.
ORDER = {
    "quant_core": (
        "errors", "slices", "codec", "attention", "losses", "backends", "proof", "cache", "artifact", "calibrate",
        "evaluation", "veloxquant",
    ),
    "server": (
        "errors", "system", "config", "access", "terminal", "grammar", "output", "memory",
        "model", "prefix_disk", "engine", "calibration", "doctor", "http",
        "serving", "launchd", "measure", "commands", "cli",
    ),
}  # fmt: skip
# Files of a package's own, beside its folders.
MAX_OWN_FILES = {"quant_core": 5, "server": 5}
MAX_FUNCTION_LINES = 60
Arrow = tuple[str, str]


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of everything imported, lazily inside functions too; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(package: str, sources: Iterable[tuple[str, ast.Module]]) -> Iterator[tuple[Arrow, str]]:
    """((importing folder, imported folder), file) of every import inside `package`; files are named from the root."""
    for name, tree in sources:
        folder = Path(name).with_suffix("").parts[1]
        for module in imported(tree):
            parts = module.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] != folder:
                yield (folder, parts[1]), name


def parsed(package: str) -> list[tuple[str, ast.Module]]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def circle(found: Mapping[Arrow, str]) -> list[str]:
    """The folders of one circle of imports, the first again at the end; empty: there is none."""
    below: dict[str, set[str]] = {}
    for importing, wanted in found:
        below.setdefault(importing, set()).add(wanted)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", ORDER)
def test_no_folders_import_each_other_in_a_circle(package: str) -> None:
    assert not circle(dict(arrows(package, parsed(package))))


@pytest.mark.parametrize("package", ORDER)
def test_a_folder_imports_only_those_below_it(package: str) -> None:
    level = {folder: number for number, folder in enumerate(ORDER[package])}
    up = [f"{name}: {a} -> {b}" for (a, b), name in arrows(package, parsed(package)) if level[b] > level[a]]
    assert not up


@pytest.mark.parametrize("package", ORDER)
def test_the_order_names_every_folder(package: str) -> None:
    there = {Path(name).with_suffix("").parts[1] for name, _ in parsed(package)} - {"__init__"}
    assert there <= set(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_a_package_has_few_files_of_its_own(package: str) -> None:
    own = [name for name, _ in parsed(package) if name.count("/") == 1 and not name.endswith("/__init__.py")]
    assert len(own) <= MAX_OWN_FILES[package], own


@pytest.mark.parametrize("package", ORDER)
def test_no_function_is_long(package: str) -> None:
    functions = [
        (node.end_lineno - node.lineno + 1, f"{name}: {node.name}")
        for name, tree in parsed(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    assert [name for lines, name in functions if lines > MAX_FUNCTION_LINES] == []


def test_the_checks_see_lazy_imports_and_circles() -> None:
    lazy = ast.parse("def f():\n    from p.b import x\n"), ast.parse("import p.a.y\nfrom p import errors\n")
    found = dict(arrows("p", [("p/a/y.py", lazy[0]), ("p/b/x.py", lazy[1])]))
    assert set(found) == {("a", "b"), ("b", "a"), ("b", "errors")}
    assert set(circle(found)) == {"a", "b"} and not circle({("a", "b"): "p/a/y.py"})
