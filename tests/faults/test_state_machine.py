"""A server against a simple model of it: what hypothesis does to both leaves both in the same state.

Requests, hang-ups, activations, calibrations, deletions, kill -9 and restarts in any order, on a real process.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.faults.process import START_LIMIT_S, ServerProcess, end, server_process
from tests.faults.stored import PACKED, store_for
from tests.server.http.conftest import eventually

SETTINGS: dict[str, dict[str, Any]] = {
    **PACKED,
    "calibration": {**PACKED["calibration"], "refine": "off"},
    "engine": {"max_num_seqs": 4, "drain_timeout_s": 2.0},
    "prefix_cache": {"disk_bytes": 4_000_000},
}
# So many tokens that the answer is not over before the next rule, or nearly none.
LENGTHS = st.sampled_from([2, 40, 1500])
PROMPTS = ("The sea", "A list of numbers: one, two, three, " * 30, "Once upon a time " * 80)
MAX_OPEN = 4
# A start takes several seconds of a processor.
MAX_STARTS = 3
# Codecs in memory at a time, that of new conversations included.
MAX_LIVE = 2


@dataclass
class OpenAnswer:
    """A stream that is being read: its request, and the codec that was active when it was sent."""

    prompt: int
    length: int
    artifact: str
    response: httpx.Response
    lines: Any
    stack: ExitStack = field(default_factory=ExitStack)


class ServerMachine(RuleBasedStateMachine):
    """The model: stored artifacts, the active one, open answers, and what each prompt was answered with."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.artifacts: set[str] = set()
        self.active = ""
        self.open: list[OpenAnswer] = []
        self.answers: dict[tuple[str, int], str] = {}
        self.by_seed: dict[int, str] = {}
        self.num_starts = 0
        self.server_stack = ExitStack()
        self.server: ServerProcess
        self.client: httpx.Client

    @initialize()
    def begin(self) -> None:
        """Two codecs are stored, the first is active."""
        first, second = store_for(self.folder / "data", 2)
        self.artifacts, self.active = {first, second}, first
        self._start()

    @precondition(lambda self: len(self.open) < MAX_OPEN)
    @rule(prompt=st.integers(0, len(PROMPTS) - 1), length=LENGTHS)
    def submit(self, prompt: int, length: int) -> None:
        """A stream begins."""
        body = {"prompt": PROMPTS[prompt], "max_tokens": length, "stream": True, "temperature": 0, "ignore_eos": True}
        stack = ExitStack()
        response = stack.enter_context(self.client.stream("POST", "/v1/completions", json=body))
        assert response.status_code == 200
        # A request has its codec when it is admitted, which it is before its first token.
        lines = response.iter_lines()
        answer = OpenAnswer(prompt, length, self.active, response, lines, stack)
        first = next(line for line in lines if line.startswith("data: "))
        answer.lines = (line for part in ([first], lines) for line in part)
        self.open.append(answer)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A stream is read to its end: as many tokens as asked for, and the same text as before."""
        answer = self._taken(data)
        text, reason, usage = _read(answer)
        assert reason == "length", (reason, text)
        known = self.answers.setdefault((answer.artifact, answer.prompt), text)
        shorter, longer = sorted((known, text), key=len)
        # A character that is not whole yet is held back at the end.
        assert longer.startswith(shorter.rstrip("\ufffd")), (answer.artifact, answer.prompt, known[:80], text[:80])
        self.answers[answer.artifact, answer.prompt] = longer
        assert usage is None or usage["completion_tokens"] == answer.length

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        """A caller goes away in the middle."""
        self._taken(data).stack.close()

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        """New conversations use another codec, unless old ones hold two already."""
        wanted = data.draw(st.sampled_from(sorted(self.artifacts)))
        answer = self._admin("POST", f"/admin/artifacts/{wanted}/activate")
        live = {a.artifact for a in self.open} | {self.active}
        if answer.status_code == 409:
            assert answer.json()["error"]["code"] == "too_many_live_artifacts"
            assert wanted not in live and len(live) >= MAX_LIVE
        else:
            assert answer.status_code == 200, answer.text
            self.active = wanted

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """A stored codec goes, unless it is used."""
        wanted = data.draw(st.sampled_from([*sorted(self.artifacts), "vq-unknown"]))
        answer = self._admin("DELETE", f"/admin/artifacts/{wanted}")
        if wanted not in self.artifacts:
            assert answer.status_code == 404
        elif answer.status_code == 200:
            # What an open answer used may be over already; then nothing of it lives any more.
            assert wanted != self.active
            self.artifacts.remove(wanted)
            assert self._admin("POST", f"/admin/artifacts/{wanted}/activate").status_code == 404
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "artifact_in_use")
            assert wanted == self.active or wanted in {a.artifact for a in self.open}

    @rule(seed=st.integers(0, 2), activate=st.booleans())
    def calibrate(self, seed: int, activate: bool) -> None:
        """A codec is fitted beside the chats: the same seed gives the same one."""
        job = self._admin("POST", "/admin/calibrations", seed=seed, activate=activate).json()
        job = self._ended(job["id"], settled=activate)
        assert job["state"] == "stored", job
        stored = job["artifact_id"]
        assert self.by_seed.setdefault(seed, stored) == stored
        self.artifacts.add(stored)
        if job["activated"]:
            self.active = stored
        elif activate:
            live = {a.artifact for a in self.open} | {self.active}
            assert len(live) >= MAX_LIVE, job["activation_error"]

    @rule(wait_s=st.sampled_from([0.0, 0.1, 0.4]))
    def calibrate_and_cancel(self, wait_s: float) -> None:
        """A fit is given up: nothing of it is left, unless it was faster."""
        job = self._admin("POST", "/admin/calibrations", seed=9, samples=8).json()
        time.sleep(wait_s)
        cancelled = self._admin("POST", f"/admin/calibrations/{job['id']}/cancel")
        ended = self._ended(job["id"])
        if ended["state"] == "stored":
            self.artifacts.add(ended["artifact_id"])
        else:
            assert cancelled.status_code == 202 and ended["state"] == "cancelled", ended

    @precondition(lambda self: self.num_starts < MAX_STARTS)
    @rule(calibrating=st.booleans())
    def crash(self, calibrating: bool) -> None:
        """kill -9, perhaps in the middle of a calibration; the next start has what was stored."""
        maybe: set[str] = set()
        if calibrating:
            self._admin("POST", "/admin/calibrations", seed=3)
            time.sleep(0.3)
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()
        self._lose_answers()
        self._start()
        if calibrating:
            maybe = self._listed() - self.artifacts
            assert len(maybe) <= 1
        self.artifacts |= maybe
        assert list((self.folder / "data" / "artifacts").glob(".new-*")) == []

    @precondition(lambda self: self.num_starts < MAX_STARTS)
    @rule()
    def restart(self) -> None:
        """SIGTERM: open answers end in one of the two ways there are."""
        self.server.process.send_signal(signal.SIGTERM)
        for answer in self.open:
            _, reason, _ = _read(answer)
            assert reason in ("length", "not_ready")
        self._lose_answers()
        assert end(self.server.process) in (0, -signal.SIGTERM)
        assert "Traceback" not in self.server.log
        self._start()

    @invariant()
    def agrees(self) -> None:
        """What the server says of itself is what the model has."""
        if not hasattr(self, "client"):
            return
        # One that hung up ends within a step.
        eventually(lambda: self._num_running() <= len(self.open), "who hung up is gone", 60)
        status = self._status()
        assert status["state"] == "ready"
        assert self._listed() == self.artifacts
        assert status["active_artifact"] == self.active
        live = {a.artifact for a in self.open} | {self.active}
        assert set(status["live_artifacts"]) <= live, (status["live_artifacts"], live)

    def teardown(self) -> None:
        """Everybody hangs up: nothing runs, nothing is held, every request is counted, the end is clean."""
        try:
            if hasattr(self, "client"):
                self._lose_answers()
                eventually(lambda: self._num_running() == 0, "all requests end", 60)
                eventually(lambda: self._status()["kv"]["running_bytes"] == 0, "their memory is free", 20)
                status = self._status()
                assert status["kv"]["pages"]["reserved"] == 0
                counters = status["counters"]
                ended = ("finished", "aborted", "refused", "failed")
                assert counters.get("accepted_requests", 0) == sum(counters.get(f"{e}_requests", 0) for e in ended)
                assert end(self.server.process) in (0, -signal.SIGTERM)
                assert "Traceback" not in self.server.log
        finally:
            self.server_stack.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.num_starts += 1
        self.server_stack.close()
        self.server = self.server_stack.enter_context(server_process(self.folder, SETTINGS))
        self.client = self.server_stack.enter_context(httpx.Client(base_url=self.server.url, timeout=120))
        # Only what is packed has a codec to compare with.
        eventually(lambda: '"packed"' in self.client.get("/readyz").text, "it packs", START_LIMIT_S)

    def _admin(self, method: str, path: str, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.server.admin_key}"}
        return self.client.request(method, path, json=body or None, headers=headers)

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._admin("GET", "/admin/status").json()
        return found

    def _num_running(self) -> int:
        requests = self._status()["requests"]
        return int(requests["running"]) + int(requests["waiting"])

    def _listed(self) -> set[str]:
        found = self._admin("GET", "/admin/artifacts").json()["data"]
        assert not any(a["damaged"] for a in found)
        assert [a["id"] for a in found if a["active"]] == [self.active]
        return {a["id"] for a in found}

    def _ended(self, job_id: str, *, settled: bool = False) -> dict[str, Any]:
        job: dict[str, Any] = {}

        def is_over() -> bool:
            job.update(self._admin("GET", f"/admin/calibrations/{job_id}").json())
            time.sleep(0.05)
            waits = settled and job["state"] == "stored" and not (job["activated"] or job["activation_error"])
            return job["ended_at"] is not None and not waits

        eventually(is_over, "the calibration ends", START_LIMIT_S)
        return job

    def _taken(self, data: st.DataObject) -> OpenAnswer:
        return self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    def _lose_answers(self) -> None:
        for answer in self.open:
            answer.stack.close()
        self.open.clear()


def _read(answer: OpenAnswer) -> tuple[str, str, dict[str, Any] | None]:
    """Text, reason of the end (a finish reason or an error's code) and usage of a stream, which is closed then."""
    text, reason, usage = "", "", None
    with answer.stack:
        for line in answer.lines:
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, str(event["error"]["code"]), None
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
    return text, reason, usage


@pytest.mark.parametrize("num", [2, pytest.param(60, marks=pytest.mark.full)], ids=["some", "many"])
def test_a_server_does_what_a_simple_model_of_it_does(num: int) -> None:
    run_state_machine_as_test(
        ServerMachine,
        settings=settings(
            max_examples=num,
            stateful_step_count=25,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            database=None,
        ),
    )
