"""Links between documents, files and modules they name, and what docstrings cite: all of it exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "quant_core", "metal_shaders", "tests", "docs", "deploy")
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.md")))
    if "node_modules" not in path.parts
)
# What was, at the time: their links hold, their file names need not.
HISTORY = {"CHANGELOG.md", "docs/journal"}
PRESENT = [path for path in DOCUMENTS if not any(path.is_relative_to(ROOT / past) for past in HISTORY)]
SOURCES = sorted(
    path
    for package in PACKAGES
    for ending in ("py", "metal", "h", "cu")
    for path in (ROOT / package).rglob(f"*.{ending}")
)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _prose(text: str) -> str:
    """Without fenced blocks, whose brackets are code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(path.read_text()), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def broken_links(path: Path) -> list[str]:
    """Relative links of a document that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(path.read_text())):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(path: Path) -> list[str]:
    """Files and folders named in backticks, from the root or the document's folder, that are not there."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|metal|h|cu))`", _prose(path.read_text()))
    ours = [n for n in named if n.partition("/")[0] in PACKAGES or "/" not in n]
    return [n for n in ours if not (ROOT / n).exists() and not _exists_by_name(path, n)]


def _exists_by_name(document: Path, name: str) -> bool:
    return (document.parent / name).exists() or ("/" not in name and name in _file_names())


@cache
def _file_names() -> frozenset[str]:
    return frozenset(path.name for path in (*SOURCES, *DOCUMENTS))


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("path", PRESENT, ids=_name)
def test_files_named_in_documents_exist(path: Path) -> None:
    assert missing_files(path) == []


@pytest.mark.parametrize("path", PRESENT, ids=_name)
def test_modules_named_in_commands_exist(path: Path) -> None:
    modules = set(re.findall(r"python -m ((?:tests|server|quant_core)[\w.]*)", path.read_text()))
    files = [ROOT / module.replace(".", "/") for module in modules]
    assert [f for f in files if not (f.with_suffix(".py").exists() or (f / "__main__.py").exists())] == []


def test_what_sources_cite_exists() -> None:
    cited = {
        (_name(path), *match)
        for path in SOURCES
        for match in re.findall(r'(docs/[\w/.-]+\.md)(?:, "([^"]+)")?', path.read_text())
        if path != Path(__file__)
    }
    assert len(cited) >= 5
    headings = {f: (ROOT / f).read_text() if (ROOT / f).exists() else None for _, f, _ in cited}
    wrong = [c for c in cited if (text := headings[c[1]]) is None or (c[2] and f"# {c[2]}\n" not in text)]
    assert wrong == []


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One: two\n[a](#one-two) [b](#three) [c](gone.md) `server/gone.py` `server/cli.py` `gone.py`\n")
    assert broken_links(page) == ["#three", "gone.md"]
    assert missing_files(page) == ["server/gone.py", "gone.py"]
