"""setuptools' commands with the commit: both distributions carry it in server/commit.txt."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parents[1]


def _write_commit(folder: Path) -> None:
    """Into a tree that is being built; a source distribution already has the file and no repository."""
    sys.path.insert(0, str(ROOT))
    from server.system.version import git_commit

    known = git_commit(ROOT) if (ROOT / ".git").exists() else None
    if known is not None:
        (folder / "server" / "commit.txt").write_text(known + "\n", encoding="ascii")


class BuildPython(build_py):
    """The wheel's files."""

    def run(self) -> None:
        """Copy the packages, then note the commit; an editable installation asks its repository."""
        super().run()
        if not self.editable_mode:
            _write_commit(Path(self.build_lib))


class SourceDistribution(sdist):
    """The sdist's files."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files, then note the commit."""
        super().make_release_tree(base_dir, files)
        _write_commit(Path(base_dir))
