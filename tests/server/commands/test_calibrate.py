"""`vecinfer calibrate`: text files, a job of a running server, and without a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quant_core.artifact.store import ArtifactStore
from quant_core.calibrate.report import EvaluationReport, GateError, LayerReport
from quant_core.slices import Progress
from server import cli
from server.access.keys import AccessKeys
from server.calibration.options import JobOptions
from server.calibration.text_file import read_text_files
from server.config import HTTPConfig, ServerConfig
from server.errors import ConfigError
from server.http.app import create_app, http_server
from tests.helpers.fake_artifacts import FakeArtifacts, FakeCodec, calibration_queue
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny_models import tiny_tokenizer, write_tiny_model
from tests.server.http.conftest import ADMIN, ADMIN_KEY, eventually

LAYERS = (LayerReport(0, 2.0, 2.0, 0.3, 0.2, 0.031), LayerReport(7, 2.0, 2.0, 0.3, 0.2, 0.12))
REPORT = EvaluationReport(
    0.0212, 0.31, 0.025, 0.941, 2.0, 2.9, 1234, 30, 30, {"keys learned": 30}, per_layer=LAYERS
)  # fmt: skip
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(), ["calibrate", *arguments])


# Text files


def test_texts_and_chats_are_found_in_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("plain [text]\n")
    (tmp_path / "mixed.jsonl").write_text(
        "\n".join(map(json.dumps, [{"text": "one"}, "two", {"messages": CHAT, "id": 4}, CHAT])) + "\n\n"
    )
    (tmp_path / "log.json").write_text(json.dumps(CHAT))
    (tmp_path / "list.json").write_text(json.dumps([{"text": "three"}, {"messages": CHAT}]))
    found = read_text_files(tmp_path / name for name in ("notes.txt", "mixed.jsonl", "log.json", "list.json"))
    assert found.texts == ("plain [text]\n", "one", "two", "three")
    assert [list(c) for c in found.conversations] == [CHAT] * 4
    rendered = found.rendered(tiny_tokenizer(tmp_path / "tokenizer"))
    assert len(rendered) == 8 and rendered[-1].count("<|im_start|>") == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "x"}', "line 1: expected"),
        ("a.json", b'[{"role": "user"}]', "item 1: expected"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_text_files([tmp_path / name])


# A running server


@dataclass
class Fitting:
    """A procedure of a few slices, which then fails if told so."""

    error: Exception | None = None
    endless: bool = False
    calls: list[JobOptions] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def __call__(self, model: Any, tokenizer: Any, options: JobOptions) -> Generator[Progress, None, Any]:
        self.calls.append(options)
        yield Progress("collect", 0.3, "reading", 2.0)
        try:
            for _ in range(6000 if self.endless else 40):  # long enough to be seen by who follows the events
                time.sleep(0.01)
                yield Progress("fit", 0.6, "layer 3 of 30", 1.0)
        except GeneratorExit:
            self.closed.set()
            raise
        if self.error is not None:
            raise self.error
        return Fitted(FakeCodec("new"), REPORT)


@dataclass(frozen=True)
class Fitted:
    codec: str
    report: EvaluationReport


@pytest.fixture(autouse=True)
def admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECINFER_ADMIN_KEY", ADMIN_KEY)


@contextmanager
def running(fitting: Fitting, keys: AccessKeys | None = None) -> Iterator[tuple[str, FakeEngine]]:
    engine, artifacts = FakeEngine(), FakeArtifacts()
    service = calibration_queue(engine, artifacts, fitting)
    config = ServerConfig(http=HTTPConfig(port=0))
    server = http_server(create_app(config, engine, keys=keys or ADMIN, calibration=service), config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, "the server starts", timeout_s=20)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        engine.close()


def test_a_job_is_followed_to_its_report_and_activated(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + '\n{"text": "more"}\n')
    fitting = Fitting()
    with running(fitting) as (url, engine):
        result = _run(
            "--url", url, "--text", str(tmp_path / "chats.jsonl"), "--bits", "2", "--key-bits", "4", "--seed", "5",
            "--samples", "8", "--sample-len", "256", "--transform", "learned", "--activate",
        )  # fmt: skip
        assert engine.activated == ["art-new"]
    assert result.exit_code == 0, result.output
    (options,) = fitting.calls
    assert (options.key_bits, options.value_bits, options.seed, options.num_samples) == (4, 2, 5, 8)
    assert (options.sample_len, options.transform, options.builtin) == (256, "learned", False)
    assert options.texts[0] == "more" and len(options.texts) == 2
    layers = "error 3.1% to 12.0%, largest in layer 7"
    for words in ("0.0212 nats", "+2.50%", "94.1%", "30 of 30 packed", "2.00 of codes; 2.90 held", layers):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == "stored as art-new, active"
    assert "layer 3 of 30 (60%)" in result.stderr


def test_without_activate_it_is_only_stored_and_json_is_json() -> None:
    with running(Fitting()) as (url, engine):
        result = _run("--url", url, "--json")
        assert engine.activated == []
    answer = json.loads(result.stdout)
    assert (answer["artifact_id"], answer["active"]) == ("art-new", False)
    assert answer["report"]["kl_mean"] == REPORT.kl_mean


def test_a_refused_codec_shows_its_figures_and_fails() -> None:
    with running(Fitting(GateError("mean KL is 0.0212 and the limit is 0.01", REPORT))) as (url, _):
        result = _run("--url", url)
    assert result.exit_code == 1
    assert "the limit is 0.01" in result.stderr and "30 of 30 packed" in result.stderr


def test_the_admin_key_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VECINFER_ADMIN_KEY")
    (tmp_path / "key").write_text("# mine\nsecret\n")
    with running(Fitting(), AccessKeys(admin=("secret",))) as (url, _):
        refused = _run("--url", url)
        assert refused.exit_code == 1 and "HTTP 40" in refused.stderr
        assert _run("--url", url, "--admin-key-file", str(tmp_path / "key")).exit_code == 0


def test_ctrl_c_cancels_the_job() -> None:
    fitting = Fitting(endless=True)
    with running(fitting) as (url, _):
        command = [sys.executable, "-m", "server.cli", "calibrate", "--url", url]
        # A shell's background jobs ignore SIGINT, and so would their children.
        restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore) as process:
            assert process.stderr is not None
            while "layer 3" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert "nothing was stored" in process.stderr.read()
        assert process.returncode == 130
        assert fitting.closed.wait(10)


def test_a_servers_model_is_its_own() -> None:
    result = _run("--model", "demo")
    assert result.exit_code == 1 and "--local" in result.stderr


# Without a server


def test_local_calibration_stores_and_activates(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    arguments = (
        "--local", "--model", str(folder), "--data-dir", str(tmp_path / "data"), "--text", str(tmp_path / "text.txt"),
        "--samples", "5", "--sample-len", "192", "--transform", "smooth_hadamard",
    )  # fmt: skip
    refused = _run(*arguments, "--max-kl", "1e-9")
    artifacts = ArtifactStore(tmp_path / "data" / "artifacts")
    assert refused.exit_code == 1 and "2 of 2 packed" in refused.stderr and artifacts.list() == []
    result = _run(*arguments, "--max-kl", "50", "--activate")
    assert result.exit_code == 0, result.output
    (manifest,) = artifacts.list()
    assert artifacts.active(manifest.fingerprint) == manifest.artifact_id
    assert result.stdout.splitlines()[-1] == f"stored as {manifest.artifact_id}, active"
    assert "keys smooth_hadamard 2" in result.stdout
    assert manifest.report["num_tokens"] > 0
