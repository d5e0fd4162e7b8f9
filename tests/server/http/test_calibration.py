"""/admin: calibration jobs from request to artifact, and what can go wrong on the way."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from quant_core.artifact.store import DamagedArtifact
from quant_core.errors import ArtifactStorageError, CodecError
from server.calibration.artifacts import CalibrationTarget
from server.calibration.options import JobOptions
from server.calibration.queue import CalibrationQueue
from server.config import ServerConfig
from server.http.app import create_app
from tests.helpers.fake_artifacts import FakeArtifacts, FakeCodec, FakeManifest, calibration_queue, loaded_target
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import ADMIN, AS_ADMIN, USER
from tests.server.http.test_errors import error_of

pytestmark = pytest.mark.anyio
URL = "/admin/calibrations"


@dataclass(frozen=True)
class FakeProgress:
    phase: str
    fraction: float
    detail: str = "working"
    remaining_s: float | None = None


@dataclass(frozen=True)
class FakeReport:
    kl_mean: float = 0.02

    def to_dict(self) -> dict[str, Any]:
        return {"kl_mean": self.kl_mean}


@dataclass(frozen=True)
class FakeResult:
    codec: str
    report: FakeReport


class RefusedFit(CodecError):
    """The gate's refusal, with its figures."""

    report = FakeReport(0.9)


@dataclass
class Procedure:
    """Four slices; the third waits for `gate`, then `error` is raised if set, and `at_end` is called."""

    gate: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    at_end: Callable[[], object] = field(default=lambda: None)
    calls: list[JobOptions] = field(default_factory=list)
    num_closed: int = 0

    def __call__(self, model: Any, tokenizer: Any, options: JobOptions) -> Generator[FakeProgress, None, FakeResult]:
        self.calls.append(options)
        try:
            yield FakeProgress("generate", 0.1)
            yield FakeProgress("collect", 0.3)
            yield FakeProgress("fit", 0.5, "layer 3 of 30", 4.0)
            while not self.gate.wait(0.005):
                yield FakeProgress("fit", 0.5, "layer 3 of 30", 4.0)
            yield FakeProgress("evaluate", 0.9)
            if self.error is not None:
                raise self.error
            self.at_end()
        except GeneratorExit:
            self.num_closed += 1
            raise
        return FakeResult(FakeCodec(f"new{len(self.calls)}"), FakeReport())


@dataclass
class Setting:
    client: httpx.AsyncClient
    engine: FakeEngine
    procedure: Procedure
    artifacts: FakeArtifacts
    service: CalibrationQueue

    async def start(self, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(URL, json=fields)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        assert answer.headers["location"] == f"{URL}/{job['id']}"
        return job

    async def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"{URL}/{job_id}")).json()
        return found

    async def until(self, job_id: str, *states: str) -> dict[str, Any]:
        for _ in range(400):
            job = await self.job(job_id)
            if job["state"] in states:
                return job
            await asyncio.sleep(0.005)
        raise AssertionError(f"{job['state']}, not {states}")


@asynccontextmanager
async def admin(engine: FakeEngine, target: Future[CalibrationTarget] | None = None) -> AsyncIterator[Setting]:
    procedure, artifacts = Procedure(), FakeArtifacts()
    artifacts.stored["art-old"] = FakeManifest("art-old", "model-1", {"kl_mean": 0.03})
    artifacts.stored["art-foreign"] = FakeManifest("art-foreign", "model-2", {})
    artifacts.stored["art-a"] = FakeManifest("art-a", "model-1", {})
    service = calibration_queue(engine, artifacts, procedure, target)
    app = create_app(ServerConfig(), engine, keys=ADMIN, calibration=service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=AS_ADMIN) as client,
    ):
        yield Setting(client, engine, procedure, artifacts, service)


async def test_a_job_is_stored_with_its_report(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        job = await s.start(bits=3, seed=7, samples=16, transform="learned")
        assert job["state"] == "queued"
        running = await s.until(job["id"], "fitting")
        assert (running["progress"], running["remaining_s"], running["detail"]) == (0.5, 4.0, "layer 3 of 30")
        chat = await s.client.post("/v1/chat/completions", json={"messages": USER})
        assert chat.status_code == 200
        s.procedure.gate.set()
        done = await s.until(job["id"], "stored")
        assert (done["artifact_id"], done["report"], done["progress"]) == ("art-new1", {"kl_mean": 0.02}, 1.0)
        options = s.procedure.calls[0]
        assert (options.key_bits, options.value_bits, options.seed, options.num_samples) == (3, 3, 7, 16)
        assert options.builtin and options.texts == () and options.transform == "learned"
        artifact = (await s.client.get("/admin/artifacts/art-new1")).json()
        assert artifact["report"] == {"kl_mean": 0.02} and artifact["active"] is False
        assert s.engine.activated == []


async def test_texts_and_conversations_are_given_to_the_job(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        await s.start(text="Once", messages=USER)
        await s.start(messages=[USER, [*USER, {"role": "assistant", "content": "Paris"}]], builtin=True)
        s.procedure.gate.set()
        await s.until((await s.client.get(URL)).json()["data"][0]["id"], "stored")
        first, second = s.procedure.calls
        chat = f"<|im_start|>user\n{USER[0]['content']}<|im_end|>\n"
        assert first.texts == ("Once", chat) and not first.builtin
        assert second.texts == (chat, chat + "<|im_start|>assistant\nParis<|im_end|>\n") and second.builtin


async def test_jobs_run_one_after_the_other(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        first, second = await s.start(), await s.start()
        await s.until(first["id"], "fitting")
        assert (await s.job(second["id"]))["state"] == "queued" and len(s.procedure.calls) == 1
        listed = (await s.client.get(URL)).json()["data"]
        assert [j["id"] for j in listed] == [second["id"], first["id"]]
        s.procedure.gate.set()
        await s.until(second["id"], "stored")


async def test_too_many_waiting_jobs(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        await s.until((await s.start())["id"], "fitting")
        answers = [await s.client.post(URL, json={}) for _ in range(9)]
        assert [a.status_code for a in answers] == [202] * 8 + [429]
        assert answers[-1].headers["retry-after"] == "60"


@pytest.mark.parametrize("verb", ["DELETE", "POST"])
async def test_cancel_a_running_job(engine: FakeEngine, verb: str) -> None:
    async with admin(engine) as s:
        job = await s.start()
        await s.until(job["id"], "fitting")
        path = f"{URL}/{job['id']}" + ("/cancel" if verb == "POST" else "")
        assert (await s.client.request(verb, path)).status_code == 202
        await s.until(job["id"], "cancelled")
        await asyncio.sleep(0.05)
        assert s.procedure.num_closed == 1 and "art-new1" not in s.artifacts.stored
        again = await s.client.request(verb, path)
        assert error_of(again, 409)["code"] == "calibration_over"


async def test_cancel_a_queued_job_and_go_on(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        first, second, third = await s.start(), await s.start(), await s.start()
        await s.until(first["id"], "fitting")
        assert (await s.client.delete(f"{URL}/{second['id']}")).json()["state"] == "cancelled"
        s.procedure.gate.set()
        await s.until(third["id"], "stored")
        assert len(s.procedure.calls) == 2


async def test_a_job_cancelled_in_its_last_slice_stores_nothing(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        job = await s.start()
        await s.until(job["id"], "fitting")
        s.procedure.at_end = lambda: setattr(s.service.job(job["id"]), "cancel_requested", True)
        s.procedure.gate.set()
        await s.until(job["id"], "cancelled")
        assert "art-new1" not in s.artifacts.stored


async def test_stopping_the_server_cancels(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        job = await s.start()
        await s.until(job["id"], "fitting")
    assert s.service.job(job["id"]).state == "cancelled"
    engine.close()
    assert s.procedure.num_closed == 1 and "art-new1" not in s.artifacts.stored


async def test_a_refused_codec_is_not_stored_but_its_figures_are_shown(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.procedure.error = RefusedFit("KL 0.9 is above max_kl 0.25")
        s.procedure.gate.set()
        job = await s.until((await s.start(activate=True))["id"], "failed")
        assert job["report"] == {"kl_mean": 0.9} and "max_kl" in job["error"]
        assert "art-new1" not in s.artifacts.stored and engine.activated == []


async def test_a_bug_in_a_job_fails_the_job_only(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.procedure.error = ZeroDivisionError("secret")
        s.procedure.gate.set()
        job = await s.until((await s.start())["id"], "failed")
        assert "ZeroDivisionError" in job["error"] and "secret" not in job["error"]
        s.procedure.error = None
        await s.until((await s.start())["id"], "stored")


async def test_progress_events(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        job = await s.start()
        await s.until(job["id"], "fitting")
        asyncio.get_running_loop().call_later(0.05, s.procedure.gate.set)
        answer = await s.client.get(f"{URL}/{job['id']}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [e.split("\ndata: ") for e in answer.text.strip().split("\n\n") if not e.startswith(":")]
        assert [name for name, _ in events][-1] == "event: stored"
        assert {name for name, _ in events[:-1]} == {"event: progress"}
        jobs = [json.loads(data) for _, data in events]
        assert jobs[0]["state"] == "fitting" and jobs[-1]["artifact_id"] == "art-new1"
        shares = [j["progress"] for j in jobs]
        assert shares == sorted(shares)


async def test_activate_after_the_job(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.procedure.gate.set()
        job = await s.start(activate=True)
        for _ in range(400):
            if (await s.job(job["id"]))["activated"]:
                break
            await asyncio.sleep(0.005)
        assert engine.activated == ["art-new1"] and s.artifacts.active_ids == {"model-1": "art-new1"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ArtifactStorageError("cannot write in /data: No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "/data/active.json"), "No space left on device: /data/active.json"),
        (ZeroDivisionError("secret"), "internal error: ZeroDivisionError; the server's log has the details"),
    ],
    ids=["storage", "system", "bug"],
)
async def test_a_failed_activation_has_its_reason_and_the_next_job_its_turn(
    engine: FakeEngine, error: Exception, reason: str
) -> None:
    async with admin(engine) as s:
        s.procedure.gate.set()
        s.artifacts.disk_error = error
        first = await s.start(activate=True)
        second = await s.start()
        await s.until(second["id"], "stored")
        job = await s.job(first["id"])
        assert (job["state"], job["activated"]) == ("stored", False)
        assert reason in job["activation_error"] and job["activation_error"] in job["detail"]
        assert engine.activated == [] and s.artifacts.active_ids == {}


async def test_what_the_engine_refuses_is_not_active_on_the_disk(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        assert (await s.client.post("/admin/artifacts/art-old/activate")).status_code == 200
        error_of(await s.client.post("/admin/artifacts/art-a/activate"), 409)
        assert s.artifacts.active_ids == {"model-1": "art-old"} and engine.activated == ["art-old"]


async def test_a_full_disk_is_told_by_name_and_nothing_is_active(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.artifacts.disk_error = ArtifactStorageError("cannot write in /data: No space left on device")
        error = error_of(await s.client.post("/admin/artifacts/art-old/activate"), 507)
        assert error["code"] == "storage_failed" and "/data: No space left" in error["message"]
        assert engine.activated == []


async def test_damaged_artifacts_are_listed_never_load_and_can_be_deleted(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.artifacts.broken["art-broken"] = DamagedArtifact("art-broken", "art-broken is corrupted; delete it")
        listed = {a["id"]: a for a in (await s.client.get("/admin/artifacts")).json()["data"]}
        assert {i: a["damaged"] for i, a in listed.items()} == {
            "art-old": False, "art-foreign": False, "art-a": False, "art-broken": True,
        }  # fmt: skip
        assert (await s.client.get("/admin/artifacts/art-broken")).json() == listed["art-broken"]
        assert listed["art-broken"]["problem"] == "art-broken is corrupted; delete it"
        refused = error_of(await s.client.post("/admin/artifacts/art-broken/activate"), 409)
        assert refused["code"] == "artifact_unusable" and "delete it" in refused["message"]
        assert (await s.client.delete("/admin/artifacts/art-broken")).json()["deleted"] is True
        error_of(await s.client.delete("/admin/artifacts/art-broken"), 404)


async def test_ended_jobs_keep_no_text(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        s.procedure.gate.set()
        job = await s.until((await s.start(text=["a" * 1000] * 3))["id"], "stored")
        assert job["options"]["num_texts"] == 3 and s.service.job(job["id"]).options.texts == ()


async def test_jobs_that_wait_when_the_server_stops_are_cancelled(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        jobs = [await s.start() for _ in range(3)]
        await s.until(jobs[0]["id"], "fitting")
    assert [s.service.job(job["id"]).state for job in jobs] == ["cancelled"] * 3


async def test_activate_delete_and_conflicts(engine: FakeEngine) -> None:
    async with admin(engine) as s:
        answer = await s.client.post("/admin/artifacts/art-foreign/activate")
        assert "another model" in error_of(answer, 409)["message"]
        assert (await s.client.post("/admin/artifacts/art-old/activate")).json()["active"] is True
        assert engine.activated == ["art-old"] and s.artifacts.active_ids == {"model-1": "art-old"}
        error_of(await s.client.post("/admin/artifacts/art-a/activate"), 409)
        assert s.artifacts.active_ids == {"model-1": "art-old"}
        error_of(await s.client.delete("/admin/artifacts/art-old"), 409)
        assert (await s.client.delete("/admin/artifacts/art-foreign")).json()["deleted"] is True
        listed = (await s.client.get("/admin/artifacts")).json()["data"]
        assert {(a["id"], a["active"], a["live"]) for a in listed} == {
            ("art-old", True, True),
            ("art-a", False, True),
        }


async def test_a_new_geometry_is_proved_in_slices_before_it_is_activated(engine: FakeEngine) -> None:
    events: list[str] = []

    def unproven(codec: Any) -> Generator[str, None, None] | None:
        def slices() -> Generator[str, None, None]:
            for kernel in ("vq_append", "vq_attention"):
                events.append(f"{kernel}, {len(engine.activated)} active")
                yield kernel

        return slices() if codec == "art-old" else None

    async with admin(engine, loaded_target(engine, unproven)) as s:
        assert (await s.client.post("/admin/artifacts/art-old/activate")).json()["active"] is True
        assert events == ["vq_append, 0 active", "vq_attention, 0 active"] and engine.activated == ["art-old"]
        error_of(await s.client.post("/admin/artifacts/art-foreign/activate"), 409)


@pytest.mark.parametrize("name", ["nope", "..", "%2e%2e%2fsecret", "a" * 500])
async def test_unknown_ids(engine: FakeEngine, name: str) -> None:
    async with admin(engine) as s:
        error_of(await s.client.get(f"{URL}/{name}"), 404)
        error_of(await s.client.get(f"/admin/artifacts/{name}"), 404)
        error_of(await s.client.post(f"/admin/artifacts/{name}/activate"), 404)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": 2, "key_bits": 2}, "bits"),
        ({"samples": 1}, "samples"),
        ({"sample_len": 10**9}, "sample_len"),
        ({"transform": "magic"}, "transform"),
        ({"seed": -1}, "seed"),
        ({"max_kl": 0}, "max_kl"),
        ({"codebooks_per_head": 3}, "codebooks_per_head"),
        ({"builtin": False}, "builtin"),
        ({"text": ""}, "text"),
        ({"text": [1]}, "text"),
        ({"messages": [[]]}, "messages[0]"),
        ({"messages": [{"role": "x", "content": "a"}]}, "messages[0][0].role"),
        ({"bitz": 2}, "bitz"),
    ],
)
async def test_wrong_fields_are_named(engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    async with admin(engine) as s:
        assert error_of(await s.client.post(URL, json=fields), 400)["param"] == param
        assert s.procedure.calls == []


async def test_before_the_model_is_loaded(engine: FakeEngine) -> None:
    async with admin(engine, Future()) as s:
        error_of(await s.client.post(URL, json={"messages": USER}), 503)
        error_of(await s.client.post("/admin/artifacts/art-old/activate"), 503)


async def test_a_float16_server_has_nothing_to_calibrate(client: httpx.AsyncClient) -> None:
    assert "fp16" in error_of(await client.post(URL, json={}, headers=AS_ADMIN), 404)["message"]
