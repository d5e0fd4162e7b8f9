"""The page: its files, logging in and out, and what it shows beyond what other routes say."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Annotated, Any

import psutil
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from quant_core.errors import QuantError
from server.config import user_data_dir
from server.errors import AuthenticationError, BadRequestError, ConfigError, ModelError, NotFoundError
from server.http.auth import fits_admin
from server.http.body import read_json
from server.http.context import AppContext, app_context
from server.http.openapi import STREAM
from server.http.page.files import page_file
from server.http.page.sessions import PageSessions, Session, is_own_page
from server.http.schemas.page import LoginBody
from server.http.sse import SSE_HEADERS
from server.http.status_report import status_report
from server.memory.chips import CHIPS
from server.system.version import version_line

files = APIRouter(prefix="/page", include_in_schema=False)
router = APIRouter(prefix="/admin")

# Slows down whoever guesses keys.
WRONG_KEY_DELAY_S = 0.5


def _sessions(context: AppContext) -> PageSessions:
    if context.sessions is None:
        raise NotFoundError("this server has no page (http.page: false)", code="not_found")
    return context.sessions


@files.get("/{name}")
async def get_file(request: Request, name: str) -> Response:
    """A file of the page; nobody need be logged in to be asked for a key."""
    _sessions(app_context(request))
    return await page_file(name)


@files.post("/login")
async def log_in(request: Request) -> JSONResponse:
    """A session for the admin key, or for a link that nobody has followed yet."""
    context = app_context(request)
    sessions = _sessions(context)
    body = await read_json(request, LoginBody, context.config.http)
    body.check()
    if not is_own_page(request):
        raise AuthenticationError("only this server's own page may log in")
    session: Session | None = None
    if body.link is not None:
        session = sessions.follow(body.link)
    elif body.key is not None and fits_admin(body.key, context.keys):
        session = sessions.new_session()
    if session is None:
        await asyncio.sleep(WRONG_KEY_DELAY_S)
        raise AuthenticationError(
            "the link was used already or is too old; run `vecinfer open` again" if body.key is None else "wrong key"
        )
    answer = JSONResponse({"token": session.token})
    # Only the header's half lets anything be done, so the cookie's life is the browser's.
    answer.set_cookie(
        sessions.cookie_name,
        session.cookie,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return answer


@files.post("/logout")
async def log_out(request: Request) -> JSONResponse:
    """End this browser's session, if it has one."""
    sessions = _sessions(app_context(request))
    answer = JSONResponse({"logged_in": False})
    session = sessions.of(request)
    if session is not None:
        sessions.end(session)
        answer.delete_cookie(sessions.cookie_name, path="/", httponly=True, samesite="strict")
    return answer


@router.post("/page-links", status_code=201)
async def new_link(request: Request) -> dict[str, Any]:
    """A secret that logs one browser in, once, within two minutes: `/#link=SECRET`."""
    return {"object": "page_link", "link": _sessions(app_context(request)).new_link()}


@router.get("/live", responses=STREAM, response_class=StreamingResponse)
async def live(request: Request, frames: Annotated[int | None, Query(ge=1)] = None) -> Response:
    """Server-sent events: `now` every second, `history` (15 minutes) at first and every five; `frames`: so many."""
    feed = app_context(request).live
    if feed is None:
        raise NotFoundError("this server has no page (http.page: false)", code="not_found")
    return StreamingResponse(feed.frames(frames), media_type="text/event-stream", headers=SSE_HEADERS)


@router.get("/requests")
async def list_requests(request: Request) -> dict[str, Any]:
    """Generation requests under way, and the last ones that ended: figures, no text."""
    return {"object": "list", **requests_report(app_context(request))}


@router.post("/requests/{request_id}/cancel", status_code=202)
async def cancel_request(request: Request, request_id: str) -> dict[str, Any]:
    """End a generation request; its caller is told, and its pages are free within one step."""
    context = app_context(request)
    found = context.activity.running.get(request_id)
    if found is None:
        raise NotFoundError(f"no request '{request_id[:100]}' is running", param="id", code="request_not_found")
    for engine_id in found.engine_ids:
        context.engine.abort(engine_id, "cancelled by the operator")
    return {"id": found.id, "object": "request", "cancelled": True}


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """The kernels' self-tests, version and commit, the configuration as loaded, recent warnings."""
    context = app_context(request)
    from server.doctor.verdict_book import VERDICTS_FILE, known_verdicts  # nobody else needs it

    verdicts = await asyncio.to_thread(known_verdicts, user_data_dir(context.config) / VERDICTS_FILE)
    commit = await asyncio.to_thread(version_line)
    return {
        "version": commit,
        "backend": context.engine.status().backend,
        "selftests": [_finite(dataclasses.asdict(verdict)) for verdict in verdicts],
        "config": context.config.model_dump(mode="json"),
        "warnings": context.warnings.latest() if context.warnings is not None else [],
    }


@router.get("/plan")
async def plan(
    model: str,
    context: Annotated[int, Query(ge=1, le=1 << 24)] = 32768,
    bits: Annotated[int, Query(ge=1, le=4)] = 2,
    chip: Annotated[str | None, Query(json_schema_extra={"enum": [*CHIPS]})] = None,
) -> dict[str, Any]:
    """What a model would need and do on a Mac: an estimate; nothing is downloaded."""
    from server.memory.plan import plan_report

    def report() -> dict[str, Any]:
        return plan_report(model, context, key_bits=bits, value_bits=bits, chip=chip or None)

    try:
        return await asyncio.to_thread(report)
    except ModelError as error:
        raise NotFoundError(str(error), param="model", code="model_not_found") from error
    except (ConfigError, QuantError) as error:
        raise BadRequestError(str(error), param="model", code="invalid_value") from error


@router.get("/models")
async def local_models() -> dict[str, Any]:
    """Language models in this machine's Hugging Face cache, with size and whether they fit."""
    from server.memory.fit import fit_of
    from server.model.local_models import cached_models

    def report() -> list[dict[str, Any]]:
        found = [(m, fit_of(m.folder, m.weight_bytes)) for m in cached_models()]
        return [{"name": m.name, "weight_bytes": m.weight_bytes, "fits": fit.fits, "fit": str(fit)} for m, fit in found]

    return {"object": "list", "data": await asyncio.to_thread(report)}


def requests_report(context: AppContext) -> dict[str, Any]:
    """Running requests with their pages, and past ones."""
    kv = context.engine.status().kv
    pages = kv.pages_by_request if kv is not None else {}
    running = [
        {**request.to_wire(), "pages": sum(pages.get(engine_id, 0) for engine_id in request.engine_ids)}
        for request in context.activity.running.values()
    ]
    return {"running": running, "past": context.activity.past()}


def live_report(context: AppContext) -> dict[str, Any]:
    """One frame of the live feed."""
    memory = {
        "weights_bytes": context.engine.status().weight_bytes,
        "process_bytes": psutil.Process().memory_info().rss,
    }
    return {**status_report(context), "memory": memory, "activity": requests_report(context)}


def _finite(value: Any) -> Any:
    """JSON has no infinity: the error of a kernel that did not run is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
