"""What deploy/ ships: the smoke test against a server, and names that exist in the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from server.access.keys import AccessKeys
from server.config import HTTPConfig, ServerConfig
from server.engine.request import FinishEvent
from server.http.app import create_app, http_server
from server.http.metrics import Metrics
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
SUFFIXES = ("_bucket", "_count", "_sum")


@contextmanager
def serving(keys: AccessKeys) -> Iterator[str]:
    """The address of a real server over the fake engine."""
    engine = FakeEngine()
    config = ServerConfig(http=HTTPConfig(port=0))
    server = http_server(create_app(config, engine, keys=keys), config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, "the server starts", timeout_s=10)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        engine.close()


def smoke(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", str(DEPLOY / "smoke.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin:/opt/homebrew/bin", "WAIT_S": "1"},
    )
    return done.returncode, done.stdout + done.stderr


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="not run: curl is not installed")


@needs_curl
def test_smoke_passes_with_a_key_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("# the key\n\nsecret-one\nsecret-two\n")
    with serving(AccessKeys(api=("secret-one",), admin=("for-admins",))) as url:
        code, text = smoke(url, str(tmp_path / "key"))
    assert code == 0, text
    assert "ok   chat, streamed" in text and "ok   a wrong key is a 401" in text and "skip /admin/status" in text


@needs_curl
def test_smoke_fails_without_the_key_and_without_a_server() -> None:
    with serving(AccessKeys(api=("secret",))) as url:
        code, text = smoke(url)
        assert code == 1 and "FAIL /v1/models: got 401, wanted 200" in text and "ok   /livez" in text
    code, text = smoke(url)
    assert code == 1 and not re.search("^ok", text, re.MULTILINE)


def exported() -> set[str]:
    """Every metric name the server exports, without the parts of histograms."""
    engine = FakeEngine()
    metrics = Metrics(engine)
    timing = metrics.start("chat")
    timing.token(0, 1)
    timing.finish(FinishEvent("r", 0, "stop", True, 3, 1, 1))
    timing.end("ok")
    text = metrics.render().decode()
    engine.close()
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


@pytest.mark.parametrize("name", ["prometheus.yml", "grafana.json"])
def test_metric_names_exist(name: str) -> None:
    used = set(re.findall(r"\bvecinfer_[a-z_0-9]+\b", (DEPLOY / name).read_text()))
    known = exported() | {"vecinfer_last_token_age_seconds", "vecinfer_step_seconds"}
    base = {re.sub(f"({'|'.join(SUFFIXES)})$", "", metric) for metric in used}
    assert used and base <= known, base - known


def test_scrape_configuration_and_dashboard_are_well_formed() -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["vecinfer"]
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_readme_names_files_that_exist() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (DEPLOY / "README.md").read_text().partition("## A Mac")[0], re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert "smoke.sh" in names
    assert [name for name in names if not (DEPLOY / name).exists()] == []


def test_image_copies_what_the_package_needs() -> None:
    ignored = (DEPLOY / "Dockerfile.cuda.dockerignore").read_text().splitlines()
    text = (DEPLOY.parent / "pyproject.toml").read_text()
    packages = re.findall(r'"(\w+)\*"', text)
    assert packages and all(f"!{package}" in ignored for package in packages)
    assert "USER vecinfer" in (DEPLOY / "Dockerfile.cuda").read_text()


def first_answer(url: str, pid: int, **environment: str) -> str:
    port = url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "first_answer.py"), str(pid), "3", "--port", port, "--bits", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_answer_is_shown_with_its_time_and_then_how_the_cache_is_held() -> None:
    with serving(AccessKeys(api=("secret",))) as url:
        shown = first_answer(url, os.getpid(), VECINFER_API_KEY="secret")
        assert first_answer(url, os.getpid()) == "", "without the key nothing is shown"
    assert re.search(r"> What is the capital of France\?\n\[\d+ s\] The capital of France is Paris", shown)
    assert re.search(r"\[\d+ s\] new conversations are exact; ", shown)


def test_the_first_answer_is_not_waited_for_when_the_server_has_ended() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert first_answer("http://127.0.0.1:9", gone.pid) == ""
