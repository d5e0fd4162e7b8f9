"""/admin: calibrations, artifacts, status."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from quant_core.artifact.schema import Manifest
from quant_core.artifact.store import DamagedArtifact
from server.calibration.job import Job
from server.calibration.queue import CalibrationQueue
from server.errors import NotFoundError
from server.http.body import read_json
from server.http.context import AppContext, app_context
from server.http.openapi import STREAM, body_of
from server.http.schemas.calibration import CalibrationBody
from server.http.sse import SSE_HEADERS, sse_comment, sse_data
from server.http.status_report import status_report
from server.http.tokenizing import on_tokenizer
from server.model.conversation import Conversation
from server.model.fair_thread import Slices
from server.model.prompts import render

router = APIRouter(prefix="/admin")


def _calibration(context: AppContext) -> CalibrationQueue:
    if context.calibration is None:
        raise NotFoundError("this server keeps float16 caches (kv_cache.method: fp16): there is nothing to calibrate")
    return context.calibration


@router.post("/calibrations", status_code=202, openapi_extra=body_of(CalibrationBody))
async def start_calibration(request: Request) -> JSONResponse:
    """Queue a calibration; chats go on meanwhile."""
    context = app_context(request)
    service = _calibration(context)
    body = await read_json(request, CalibrationBody, context.config.http)
    body.check()
    conversations = [tuple(message.to_openai() for message in messages) for messages in body.messages or []]
    service.check_loaded()

    def work(tokenizer: Any) -> Slices[tuple[str, ...]]:
        found: list[str] = []
        for messages in conversations:
            found.append((yield from render(tokenizer, Conversation(messages, generation_prompt=False))))
            yield
        return tuple(found)

    texts = await on_tokenizer(request, work, sum(len(messages) for messages in conversations))
    job = service.submit(body.options(context.config, texts))
    return JSONResponse(job.to_wire(), 202, headers={"Location": f"/admin/calibrations/{job.id}"})


@router.get("/calibrations")
async def list_calibrations(request: Request) -> dict[str, Any]:
    """Jobs since the server started, the latest first."""
    return {"object": "list", "data": [job.to_wire() for job in _calibration(app_context(request)).jobs()]}


@router.get("/calibrations/{job_id}")
async def get_calibration(request: Request, job_id: str) -> dict[str, Any]:
    """State, progress, and at the end the report or the reason."""
    return _calibration(app_context(request)).job(job_id).to_wire()


@router.get("/calibrations/{job_id}/events", responses=STREAM, response_class=StreamingResponse)
async def calibration_events(request: Request, job_id: str) -> Response:
    """Server-sent events: the job at once and at every change; the last one is named after its final state."""
    context = app_context(request)
    job = _calibration(context).job(job_id)
    frames = _job_frames(job, context.config.http.keepalive_s)
    return StreamingResponse(frames, media_type="text/event-stream", headers=SSE_HEADERS)


async def _job_frames(job: Job, keepalive_s: float) -> AsyncGenerator[bytes, None]:
    while not job.is_over:
        yield sse_data(job.to_wire(), event="progress")
        while not await job.changed(keepalive_s):
            yield sse_comment("keepalive")
    yield sse_data(job.to_wire(), event=job.state)


@router.post("/calibrations/{job_id}/cancel", status_code=202)
@router.delete("/calibrations/{job_id}", status_code=202)
async def cancel_calibration(request: Request, job_id: str) -> JSONResponse:
    """Ask for the end of a job; it ends at its next slice and leaves nothing."""
    return JSONResponse(_calibration(app_context(request)).cancel(job_id).to_wire(), 202)


@router.get("/artifacts")
async def list_artifacts(request: Request) -> dict[str, Any]:
    """Stored artifacts of all models, which one new conversations use, and those that are damaged."""
    context = app_context(request)
    found = await _calibration(context).artifacts.list()
    return {"object": "list", "data": [_artifact(context, artifact) for artifact in found]}


@router.get("/artifacts/{artifact_id}")
async def get_artifact(request: Request, artifact_id: str) -> dict[str, Any]:
    """One artifact with its evaluation report."""
    context = app_context(request)
    return _artifact(context, await _calibration(context).artifacts.find(artifact_id))


@router.post("/artifacts/{artifact_id}/activate")
async def activate_artifact(request: Request, artifact_id: str) -> dict[str, Any]:
    """New conversations use it from the next step on; running ones finish on theirs."""
    await _calibration(app_context(request)).artifacts.activate(artifact_id)
    return {"id": artifact_id, "object": "artifact", "active": True}


@router.delete("/artifacts/{artifact_id}")
async def delete_artifact(request: Request, artifact_id: str) -> dict[str, Any]:
    """Remove an artifact that nothing uses, damaged or not."""
    await _calibration(app_context(request)).artifacts.delete(artifact_id)
    return {"id": artifact_id, "object": "artifact", "deleted": True}


def _artifact(context: AppContext, found: Manifest | DamagedArtifact) -> dict[str, Any]:
    status = context.engine.status()
    damaged = isinstance(found, DamagedArtifact)
    return {
        **(dataclasses.asdict(found) if isinstance(found, DamagedArtifact) else found.model_dump()),
        "id": found.artifact_id,
        "object": "artifact",
        "damaged": damaged,
        "active": found.artifact_id == status.active_artifact,
        "live": found.artifact_id in status.live_artifacts,
    }


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """The model, how its cache is held, measured bytes, pool, artifact, versions."""
    return status_report(app_context(request))
