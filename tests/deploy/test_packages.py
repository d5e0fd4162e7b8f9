"""Wheel and source distribution: what they hold, and that an empty environment serves from them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from server.config import child_environment
from tests.faults.nginx import free_port
from tests.faults.process import end
from tests.server.http.conftest import eventually

ROOT = Path(__file__).parents[2]
FORMULA = ROOT / "deploy" / "homebrew" / "formula"


def run(
    *command: str | Path, cwd: Path = ROOT, changes: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = child_environment(**(changes or {}))
    environment.pop("PYTHONPATH", None)
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, made from a copy of what is under version control, or would be."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_wheel_holds_the_program_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(one(built, "*.whl")) as wheel:
        names = wheel.namelist()
        information = next(n.partition("/")[0] for n in names if n.endswith("/METADATA"))
        about = Parser().parsestr(wheel.read(f"{information}/METADATA").decode())
        entries = wheel.read(f"{information}/entry_points.txt").decode()
        commit = wheel.read("server/commit.txt").decode().strip() if "server/commit.txt" in names else None
    assert {n.partition("/")[0] for n in names} == {"server", "quant_core", "metal_shaders", information}
    wanted = {"server/cli.py", "server/memory/presets.json", "quant_core/calibrate/prompts.txt"}
    wanted |= {
        path.relative_to(ROOT).as_posix()
        for pattern in ("metal_shaders/**/*.metal", "metal_shaders/**/*.h", "server/**/*.js", "server/**/*.css")
        for path in ROOT.glob(pattern)
    }
    assert wanted <= set(names)
    assert about["Name"] == "vecinfer-server" and about["License-Expression"] == "Apache-2.0"
    assert f"{information}/licenses/LICENSE" in names
    assert about["Requires-Python"] == ">=3.11" and "packed" in about["Summary"]
    assert entries.strip().splitlines()[1] == "vecinfer = server.cli:main"
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert commit is not None and re.fullmatch(r"[0-9a-f]{12}\+?", commit)


def test_the_source_distribution_can_build_it(built: Path) -> None:
    with tarfile.open(one(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "config.yaml", "deploy/build_commands.py", "server/cli.py"}
    assert wanted <= names
    assert not {n for n in names if n.startswith((".git", "tests/", "build/")) or n.endswith(".pyc")}


def test_an_index_would_take_both(built: Path) -> None:
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def uv_environment(folder: Path) -> dict[str, str]:
    """uv's own folders under `folder`, and the package index that pip is configured for."""
    found = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    for ours, theirs in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        value = settings.get(f":env:.{ours}", settings.get(f"global.{ours}"))
        if value is not None:
            found[theirs] = value.strip("'")
    return found


@pytest.mark.slow
@pytest.mark.demo
def test_uv_installs_it_into_nothing_and_it_serves_from_anywhere(
    built: Path, tmp_path: Path, demo_model_dir: Path
) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    places = uv_environment(tmp_path)
    done = run(uv, "tool", "install", "--python", sys.executable, one(built, "*.whl"), changes=places)
    assert done.returncode == 0, done.stderr[-3000:]
    it_serves(tmp_path, ("uv", uv), places, demo_model_dir)


@pytest.mark.full
@pytest.mark.demo
def test_pipx_installs_a_checkout_and_it_serves_from_anywhere(tmp_path: Path, demo_model_dir: Path) -> None:
    (tmp_path / "home").mkdir()
    assert run(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    done = run(tmp_path / "venv" / "bin" / "pip", "install", "--quiet", "pipx")
    assert done.returncode == 0, done.stderr[-3000:]
    pipx = str(tmp_path / "venv" / "bin" / "pipx")
    places = {"HOME": tmp_path / "home", "PIPX_HOME": tmp_path / "pipx", "PIPX_BIN_DIR": tmp_path / "bin"}
    changes = {name: str(place) for name, place in places.items()}
    done = run(pipx, "install", "--python", sys.executable, ".", changes=changes)
    assert done.returncode == 0, done.stderr[-3000:]
    it_serves(tmp_path, ("pipx", pipx), changes, demo_model_dir)


def it_serves(folder: Path, installer: tuple[str, str], places: Mapping[str, str], demo_model_dir: Path) -> None:
    """`folder`/bin/vecinfer names its commit; what it says is missing is added as it says; the demo model answers."""
    vecinfer = folder / "bin" / "vecinfer"
    version = run(vecinfer, "--version", cwd=folder).stdout
    assert version.startswith("vecinfer-server "), version
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert re.search(r"[0-9a-f]{12}", version), version
    if sys.platform == "linux":
        # MLX has no back end yet: what it says to run is run.
        missing = run(vecinfer, "serve", "--model", "demo", cwd=folder)
        assert missing.returncode == 1 and "Traceback" not in missing.stderr
        command = missing.stderr.splitlines()[1].strip()
        assert command.startswith(f"{installer[0]} ") and "mlx[cpu]==" in command
        command = command.replace(f"{installer[0]} ", f"'{installer[1]}' ", 1)
        added = run("bash", "-c", command, cwd=folder, changes=places)
        assert added.returncode == 0, added.stderr
    with installed_server(vecinfer, folder, demo_model_dir.parents[1]) as url:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        body: dict[str, Any] = {"messages": question, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]


@contextmanager
def installed_server(vecinfer: Path, folder: Path, data: Path) -> Iterator[str]:
    """`vecinfer serve --model demo` in another folder, with exact caches so that nothing is fitted."""
    home, port = folder / "home", free_port()
    (home / "data" / "models").mkdir(parents=True, exist_ok=True)
    for model in (data / "models").iterdir():
        (home / "data" / "models" / model.name).symlink_to(model)
    environment = child_environment(HOME=str(home), VECINFER_HOME=str(home / "data"))
    for name in ("PYTHONPATH", "VECINFER_ADMIN_KEY", "VECINFER_API_KEY"):
        environment.pop(name, None)
    command = [str(vecinfer), "serve", "--model", "demo", "--method", "fp16", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or is_ready(url), "the server is ready", 90)
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        end(process)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def homebrew() -> ModuleType:
    """deploy/homebrew/formula as a module."""
    loader = importlib.machinery.SourceFileLoader("homebrew_formula", str(FORMULA))
    spec = importlib.util.spec_from_loader("homebrew_formula", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


REPORT = {
    "install": [
        {
            "metadata": {"name": name},
            "download_info": {
                "url": f"https://mirror.example/some/where/{file}",
                "archive_info": {"hashes": {"sha256": digit * 64}},
            },
        }
        for name, file, digit in (
            ("mlx", "mlx-0.32.4-cp312-cp312-macosx_14_0_arm64.whl", "b"),
            ("annotated-doc", "annotated_doc-0.0.7-py3-none-any.whl", "a"),
        )
    ]
}


def test_the_formula_is_ruby_and_names_every_wheel_by_pypi_s_address(
    built: Path, homebrew: ModuleType, tmp_path: Path
) -> None:
    text = homebrew.formula(one(built, "*.tar.gz"), REPORT, "3.12", None, "https://example.org")
    assert re.findall(
        r'resource "(.+)" do\n    url "https://files\.pythonhosted\.org/packages/(\S+)", using', text
    ) == [
        ("annotated-doc", "py3/a/annotated-doc/annotated_doc-0.0.7-py3-none-any.whl"),
        ("mlx", "cp312/m/mlx/mlx-0.32.4-cp312-cp312-macosx_14_0_arm64.whl"),
    ]
    assert not re.search(r"@[A-Z]+@", text) and 'depends_on "python@3.12"' in text and 'system "python3.12"' in text
    if shutil.which("ruby") is None:
        pytest.skip("not run: Ruby is not installed, so its syntax was not checked")
    (tmp_path / "vecinfer.rb").write_text(text)
    done = run("ruby", "-wc", tmp_path / "vecinfer.rb")
    assert done.returncode == 0 and done.stdout.strip() == "Syntax OK", done.stderr


def test_the_formula_asks_for_what_a_mac_needs(built: Path, homebrew: ModuleType) -> None:
    wanted = homebrew.on_a_mac(homebrew.requirements_of(one(built, "*.tar.gz")), "3.12")
    assert any(line.startswith("mlx==") for line in wanted) and any(line.startswith("mlx-lm") for line in wanted)
    assert not any("pytest" in line or "cuda" in line or "[cpu]" in line for line in wanted)
    assert homebrew.on_a_mac(["a; platform_system == 'Linux'", "b>=1; sys_platform == 'darwin'"], "3.12") == ["b>=1"]
