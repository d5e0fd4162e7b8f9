"""The server answers as soon as the weights are loaded, from exact caches where nothing else is there; packs later."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import build_app
from tests.server.serving.conftest import Service, serving, tiny_server


def test_chats_are_answered_beside_the_first_calibration_and_packed_after_it(folder: Path) -> None:
    answers: list[dict[str, Any]] = []
    with serving(tiny_server(folder)) as server:
        ready = server.client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["packing"].startswith(("calibrating", "waiting"))
        before = server.chat()["choices"][0]["message"]["content"]
        server.wait(lambda: "fitting layer 1" in server.status()["packing"]["detail"])
        long_one = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=1500)))
        long_one.start()
        server.wait(lambda: server.engine.status().num_running == 1)
        packing = server.until("packed")
        assert packing["running"] == {"packed": 0, "exact": 1}, "the long answer is to run over the swap"
        # A new conversation is packed beside it.
        after = server.chat()["choices"][0]["message"]["content"]
        packing = server.status()["packing"]
        assert packing["since_start"] == {"packed": 1, "exact": 2}
        assert server.client.get("/readyz").json() == {"status": "ok", "packing": "packed"}
        long_one.join(60)
        status = server.status()
        assert status["kv"]["method"] == "vecinfer" and status["active_artifact"]
        assert status["codec"]["served"]["key_bits"] == status["codec"]["asked"]["key_bits"] == 1
        assert len(status["live_artifacts"]) == 1
        (job,) = server.client.get("/admin/calibrations").json()["data"]
        assert job["state"] == "stored" and job["activated"]
        assert_empty(server)
    assert answers[0]["usage"]["completion_tokens"] == 1500
    assert before == after, "a short answer reads no codes, so it is the same"

    with serving(tiny_server(folder)) as server:
        assert server.status()["packing"]["state"] == "packed"
        server.chat()
        assert server.status()["packing"]["since_start"] == {"packed": 1, "exact": 0}


def test_no_request_is_lost_when_callers_keep_coming_over_the_swap(folder: Path) -> None:
    lengths: list[int] = []

    def caller() -> None:
        while len(lengths) < 200 and (server.status()["packing"]["state"] != "packed" or len(lengths) % 16):
            lengths.append(server.chat(max_tokens=12)["usage"]["completion_tokens"])

    with serving(tiny_server(folder)) as server:
        callers = [threading.Thread(target=caller) for _ in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(120)
        server.until("packed")
        lengths.append(server.chat(max_tokens=12)["usage"]["completion_tokens"])
        status = server.status()
        since = status["packing"]["since_start"]
        assert lengths == [12] * len(lengths) and sum(since.values()) == len(lengths)
        assert since["exact"] > 0 < since["packed"]
        assert status["counters"]["finished_requests"] == len(lengths) and not status["counters"].get("failed_requests")
        assert_empty(server)


def assert_empty(server: Service) -> None:
    """Nothing of the exact store is left, and the packed one's books balance."""

    def check() -> None:
        scheduler = server.engine._scheduler
        assert scheduler is not None and [batch.is_packed for batch in scheduler.batches] == [True]
        scheduler.batches[0].store.check_integrity()

    server.wait(lambda: server.engine.status().num_running == 0)
    server.engine.call(check).result(10)


def test_a_gate_that_refuses_everything_leaves_it_exact_and_says_why(folder: Path) -> None:
    strict = tiny_server(folder, calibration={"max_kl": 1e-12}, kv_cache={"key_bits": 3, "value_bits": 3})
    with serving(strict) as server:
        packing = server.until("exact")
        assert "calibration.max_kl" in packing["detail"] and "no codec passed the gate" in packing["detail"]
        assert server.client.get("/readyz").json() == {"status": "ok", "packing": "exact"}
        jobs = server.client.get("/admin/calibrations").json()["data"]
        assert [job["options"]["key_bits"] for job in jobs] == [4, 3]
        assert server.chat()["usage"]["completion_tokens"] == 8


def test_a_first_calibration_that_is_cancelled_leaves_it_exact(folder: Path) -> None:
    with serving(tiny_server(folder, calibration={"num_samples": 400, "sample_len": 512})) as server:
        (job,) = server.client.get("/admin/calibrations").json()["data"]
        assert server.client.delete(f"/admin/calibrations/{job['id']}").status_code == 202
        assert "cancelled" in server.until("exact")["detail"]
        server.chat()
        started = server.client.post("/admin/calibrations", json={"samples": 8, "sample_len": 192, "activate": True})
        assert started.status_code == 202
        server.until("packed")


def test_block_is_ready_only_when_it_packs(folder: Path) -> None:
    config = tiny_server(folder, calibration={"auto": "block"})
    with serving(config) as server:
        assert server.status()["packing"]["state"] == "packed"
        assert server.client.get("/admin/calibrations").json()["data"] == []


def test_without_auto_it_stays_exact_and_names_the_command(folder: Path) -> None:
    with serving(tiny_server(folder, calibration={"auto": False})) as server:
        packing = server.until("exact")
        assert "vecinfer calibrate --local" in packing["detail"] and packing["progress"] is None
        server.chat()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The terminal's lines, without its line ends."""
    return " ".join(capsys.readouterr().err.split())


def test_the_named_command_makes_what_every_setting_asks_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "key_bits": 2, "value_bits": 1, "transform": "smooth_hadamard", "codebooks_per_head": 2,
        "allocation": "measured", "window": 72, "num_sink_tokens": 2, "bucket_len": 1024,
    }  # fmt: skip
    config = tiny_server(folder, kv_cache=asked, calibration={"auto": False})
    with serving(config) as server:
        command = server.until("exact")["detail"].partition("fit one with: ")[2]
        assert server.status()["codec"] == {"asked": asked, "served": {}}
    assert "codec asked for: key_bits 2, value_bits 1" in said(capsys)
    made = CliRunner().invoke(build_app(), shlex.split(command)[1:])
    assert made.exit_code == 0, made.output
    with serving(config) as server:
        assert server.status()["packing"]["state"] == "packed"
        assert server.status()["codec"] == {"asked": asked, "served": asked}
    assert "codec served: key_bits 2, value_bits 1, transform smooth_hadamard" in said(capsys)
    # The active codec stays where nothing else is asked for, and that is said.
    with serving(tiny_server(folder, kv_cache={"key_bits": 2, "value_bits": 1}, calibration={"auto": False})) as server:
        found = server.status()["codec"]
        assert (found["asked"]["window"], found["served"]["window"]) == (64, 72)
    assert "window 72 (settings: 64)" in said(capsys)


def test_a_model_that_cannot_be_packed_is_served_exact(folder: Path) -> None:
    with serving(tiny_server(folder, "mamba")) as server:
        packing = server.until("exact")
        assert packing["detail"].startswith("no layer of this model can be packed: ") and "\n" not in packing["detail"]
        assert server.chat()["usage"]["completion_tokens"] == 8
        assert server.status()["packing"]["since_start"] == {"packed": 0, "exact": 1}


@pytest.mark.parametrize(("family", "auto"), [("mamba", True), ("llama", False)])
def test_require_packed_refuses_what_would_be_exact(folder: Path, family: str, auto: bool) -> None:
    config = tiny_server(folder, family, kv_cache={"require_packed": True}, calibration={"auto": auto})
    with serving(config) as server:
        ready = server.client.get("/readyz")
        assert ready.status_code == 503 and "kv_cache.require_packed" in ready.json()["detail"]


def test_a_window_that_leaves_nothing_to_pack_is_refused(folder: Path) -> None:
    with serving(tiny_server(folder, kv_cache={"window": 100_000})) as server:
        ready = server.client.get("/readyz")
        assert ready.status_code == 503 and "kv_cache.window: 100000" in ready.json()["detail"]


def test_a_start_that_is_cut_off_begins_again(folder: Path) -> None:
    slow = tiny_server(folder, calibration={"num_samples": 400, "sample_len": 512})
    with serving(slow) as server:
        server.chat()
    with serving(tiny_server(folder)) as server:
        assert server.status()["packing"]["state"] != "packed"
        server.until("packed")
