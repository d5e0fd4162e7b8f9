"""The ASGI application: routes, keys, CORS, errors, and the life of what stands behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection

from server.calibration.queue import CalibrationQueue
from server.config import AccessKeys, ServerConfig
from server.engine.interface import Engine
from server.http.auth import check_admin, check_api_key
from server.http.context import Services
from server.http.error_handlers import add_error_handlers
from server.http.metrics import Metrics
from server.http.openapi import describe
from server.http.routes import admin, chat, completions, health, metrics, models
from server.http.schemas.calibration import CalibrationBody
from server.http.schemas.chat import ChatBody
from server.http.schemas.completions import CompletionBody
from server.model.prompts import PromptBuilder

log = logging.getLogger(__name__)


def create_app(
    config: ServerConfig,
    engine: Engine,
    *,
    keys: AccessKeys | None = None,
    calibration: CalibrationQueue | None = None,
) -> FastAPI:
    """The application on an engine that may still be loading its model.

    Args:
        config: the whole configuration.
        engine: started and stopped by the caller.
        keys: from `load_keys(config)`; none by default.
        calibration: jobs and artifacts; started and stopped with the application. None: no such routes (fp16).
    """
    access = keys or AccessKeys()
    parts = Services(
        config=config,
        engine=engine,
        keys=access,
        metrics=Metrics(engine),
        prompts=PromptBuilder(lambda: engine.tokenizer),
        calibration=calibration,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if calibration is not None:
            calibration.start()
        try:
            yield
        finally:
            if calibration is not None:
                await calibration.stop()
            parts.prompts.close()

    app = FastAPI(title="vecinfer", lifespan=lifespan, redirect_slashes=False)
    app.state.services = parts
    add_error_handlers(app, parts.metrics.errors)
    _add_routes(app, access, config)
    describe(app, [ChatBody, CompletionBody, CalibrationBody])
    if config.http.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.http.cors_origins),
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "Location"],
        )
    return app


def _add_routes(app: FastAPI, keys: AccessKeys, config: ServerConfig) -> None:
    """The API behind its key, the admin routes behind theirs, probes and metrics open."""

    async def api_key(connection: HTTPConnection) -> None:
        check_api_key(connection, keys)

    async def admin_key(connection: HTTPConnection) -> None:
        check_admin(connection, keys, config.http)

    for module in (chat, completions, models):
        app.include_router(module.router, dependencies=[Depends(api_key)])
    app.include_router(admin.router, dependencies=[Depends(admin_key)])
    for module in (health, metrics):
        app.include_router(module.router)


def http_server(app: FastAPI, config: ServerConfig) -> uvicorn.Server:
    """A uvicorn server for `app`, without its log configuration.

    Forwarding headers are never believed (`proxy_headers` off): admin routes trust the peer's address.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.http.host,
            port=config.http.port,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(config.engine.drain_timeout_s),
        )
    )
