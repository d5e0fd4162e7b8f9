"""Every error leaves in the form of the API that was called."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from server.errors import BadRequestError, NotFoundError, NotReadyError, QueueFullError, ServerError, internal_error
from server.http.error_shapes import error_body
from server.http.metrics import Metrics
from server.http.sse import CLIENT_CLOSED_REQUEST, ClientGone
from server.http.wire import request_id

log = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI, metrics: Metrics, routes: Sequence[Route]) -> None:
    """Give `app` a handler for everything that can be raised under it; errors and hang-ups are counted.

    Args:
        routes: all of them, for the methods that a path allows.
    """

    def answer(request: Request, error: ServerError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        metrics.errors.labels(str(error.status)).inc()
        body = error_body(request, error)
        return JSONResponse(body, error.status, headers={**(headers or {}), **_headers(error)})

    @app.exception_handler(ServerError)
    async def on_server_error(request: Request, error: ServerError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(ClientGone)
    async def on_hang_up(request: Request, error: ClientGone) -> Response:
        metrics.start(request.url.path).end("aborted")
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(_allowed((*routes, *app.routes), request.scope))}
        return answer(request, _from_http(request, error), headers)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1]) if first["loc"] else None
        return answer(request, BadRequestError(f"{param}: {first['msg']}", param=param, code="invalid_value"))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        name = request_id(request)
        log.error("%s: %s %s failed", name, request.method, request.url.path, exc_info=error)
        return answer(request, internal_error(name), {"x-request-id": name, "request-id": name})


def _headers(error: ServerError) -> dict[str, str]:
    """What goes with 401, and with what may be tried again."""
    if error.status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, QueueFullError | NotReadyError) and error.retry_after_s is not None:
        return {"Retry-After": str(error.retry_after_s)}
    return {}


def _allowed(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """The methods of all routes of this path; the framework names those of the first."""
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE:
            found |= route.methods or set()
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def _from_http(request: Request, error: HTTPException) -> ServerError:
    """The framework's own errors: no such route, wrong method."""
    if error.status_code == HTTPStatus.NOT_FOUND:
        return NotFoundError(f"there is no {request.url.path[:200]} here", code="not_found")
    message = str(error.detail)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.method[:20]} is not allowed on {request.url.path[:200]}"
    converted = BadRequestError(message) if error.status_code < 500 else ServerError(message)
    converted.status = error.status_code
    return converted
