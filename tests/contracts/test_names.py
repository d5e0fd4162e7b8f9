"""A class name means one thing in the tree."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("server", "quant_core") for path in (ROOT / package).rglob("*.py"))


def repeated(sources: Iterable[tuple[str, ast.Module]]) -> dict[str, list[str]]:
    """Names of classes that stand more than once, and the files they stand in."""
    found: dict[str, list[str]] = defaultdict(list)
    for file, tree in sources:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(file)
    return {name: files for name, files in found.items() if len(files) > 1}


def test_no_two_classes_have_one_name() -> None:
    trees = ((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES)
    assert not repeated(trees)


def test_the_check_sees_a_name_that_stands_twice() -> None:
    trees = [("a.py", ast.parse("class Row: ...")), ("b.py", ast.parse("class Row:\n    class Cell: ..."))]
    assert repeated(trees) == {"Row": ["a.py", "b.py"]}
