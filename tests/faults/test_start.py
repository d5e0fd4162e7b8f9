"""Starts under settings and limits that cannot work end with one line; what can work does."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.faults.process import command, environment, server_process, vecinfer

SETPRIV = shutil.which("setpriv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("engine: {drain_timeout_s: .inf}", "engine.drain_timeout_s"),
        ("engine: {watchdog_s: .nan}", "engine.watchdog_s"),
        ("engine: {queue_timeout_s: 1.0e+300}", "engine.queue_timeout_s"),
        ("data_dir: /dev/null", "/dev/null"),
        ("data_dir: /dev/null/below", "/dev/null"),
        ("http: {host: 0.0.0.0}", "--insecure"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, settings: str, message: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "mine.yaml").write_text(settings + "\n")
    result = vecinfer(tmp_path, "serve", "-c", str(tmp_path / "mine.yaml"), "--port", "0")
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.startswith("error: ")


@pytest.mark.skipif(SETPRIV is None, reason="not run: setpriv is not installed")
def test_too_few_descriptors_are_said(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert SETPRIV is not None
    start = [SETPRIV, "--bounding-set", "-sys_resource", *command("serve", "--port", "0")]
    result = subprocess.run(
        start,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert result.returncode == 1 and "64 files" in result.stderr and "ulimit -n" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_was_stopped_for_a_while_lives_on(tmp_path: Path) -> None:
    """SIGSTOP in the middle of an answer, for longer than the watchdog's time."""
    with server_process(tmp_path, {"engine": {"watchdog_s": 2.0}}) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(5)
            server.process.send_signal(signal.SIGCONT)
            for _ in range(20):
                next(lines)
        time.sleep(1)
        assert server.process.poll() is None
        assert httpx.get(f"{server.url}/readyz").status_code == 200
