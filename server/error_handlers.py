"""Every error leaves in OpenAI's form."""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.errors import BadRequestError, NotFoundError, NotReadyError, QueueFullError, ServerError

log = logging.getLogger(__name__)


def error_response(error: ServerError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error's status and body; 401 and the retryable ones with the headers that go with them."""
    headers = dict(headers or {})
    if isinstance(error, QueueFullError | NotReadyError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Give `app` a handler for everything that can be raised under it."""

    @app.exception_handler(ServerError)
    async def on_server_error(request: Request, error: ServerError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(_from_http(request, error), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1]) if first["loc"] else None
        return error_response(BadRequestError(f"{param}: {first['msg']}", param=param, code="invalid_value"))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(ServerError("internal error; the server's log has the details", code="internal_error"))


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
