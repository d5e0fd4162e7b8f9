"""The ASGI application: one table of routes, keys, CORS, errors, and the life of what stands behind them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from socket import socket
from typing import Literal

import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from server.access.keys import AccessKeys
from server.calibration.queue import CalibrationQueue
from server.config import HTTPConfig, ServerConfig, user_data_dir
from server.engine.interface import Engine
from server.http.auth import check_admin, check_api_key, holds_key
from server.http.callers import LOCAL_PAGES, CallerRules
from server.http.connection import ConnectionLimits, LimitedConfig, connections_within
from server.http.context import AppContext
from server.http.error_handlers import add_error_handlers
from server.http.metrics import Metrics
from server.http.openapi import describe
from server.http.page import routes as page
from server.http.page.live import History, LiveFeed
from server.http.page.sessions import PageSessions
from server.http.page.warning_log import WarningLog
from server.http.response_store import STORE_FILE, ResponseStore
from server.http.routes import (
    admin,
    chat,
    completions,
    embeddings,
    health,
    home,
    messages,
    metrics,
    models,
    prefixes,
    responses,
    sessions,
    tokens,
)
from server.http.schemas.calibration import CalibrationBody
from server.http.schemas.chat import ChatBody
from server.http.schemas.completions import CompletionBody
from server.http.schemas.embeddings import EmbeddingBody
from server.http.schemas.messages import MessagesBody, TokenCountBody
from server.http.schemas.responses import ResponseBody
from server.http.schemas.sessions import RestoreBody, SessionBody
from server.http.schemas.tokens import DetokenizeBody, TokenizeBody
from server.http.wire import EXPOSED_HEADERS, WireMiddleware
from server.model.prompts import PromptBuilder
from server.system.descriptors import raise_descriptor_limit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouteGroup:
    """The routes of one module, the key that opens them, and the bodies that they read."""

    router: APIRouter
    key: Literal["api", "admin", "none"]
    bodies: tuple[type[BaseModel], ...] = ()


ROUTES = (
    RouteGroup(chat.router, "api", (ChatBody,)),
    RouteGroup(completions.router, "api", (CompletionBody,)),
    RouteGroup(messages.router, "api", (MessagesBody, TokenCountBody)),
    RouteGroup(responses.router, "api", (ResponseBody,)),
    RouteGroup(embeddings.router, "api", (EmbeddingBody,)),
    RouteGroup(tokens.router, "api", (TokenizeBody, DetokenizeBody)),
    RouteGroup(models.router, "api"),
    RouteGroup(admin.router, "admin", (CalibrationBody,)),
    RouteGroup(prefixes.router, "admin"),
    RouteGroup(sessions.router, "admin", (SessionBody, RestoreBody)),
    RouteGroup(page.router, "admin"),
    RouteGroup(page.files, "none"),
    RouteGroup(home.router, "none"),
    RouteGroup(health.router, "none"),
    RouteGroup(metrics.router, "none"),
)

# For the last bytes of answers to be read, once every request has ended.
CLOSING_S = 3


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
        keys: from `server_keys(config)`; by default /v1 is open and /admin closed.
        calibration: jobs and artifacts; started and stopped with the application. None: no such routes (fp16).
    """
    access = keys or AccessKeys()
    context = _context(config, engine, access, calibration)
    # The framework's own pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="vecinfer", lifespan=lambda app: _running(context), redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.state.context = context
    routes = [(route, group) for group in ROUTES for route in group.router.routes if isinstance(route, APIRoute)]
    add_error_handlers(app, context.metrics, [route for route, _ in routes])
    _add_routes(app, context, CallerRules.of(config.http))
    bodies = [body for group in ROUTES for body in group.bodies]
    keys_by_path = {route.path_format: group.key for route, group in routes}
    describe(
        app,
        bodies,
        keys_by_path,
        takes_unknown=config.http.unknown_fields == "ignore",
        open_api=not access.api,
        refused={} if config.http.request_templates else {ChatBody: ("chat_template",)},
    )
    _add_cors(app, config.http)
    app.add_middleware(WireMiddleware)
    return app


def _context(
    config: ServerConfig, engine: Engine, keys: AccessKeys, calibration: CalibrationQueue | None
) -> AppContext:
    """What all routes share."""
    context = AppContext(
        config=config,
        engine=engine,
        keys=keys,
        metrics=Metrics(engine),
        prompts=PromptBuilder(lambda: engine.tokenizer),
        calibration=calibration,
        response_store=_response_store(config),
    )

    return _with_page(context) if config.http.page else context


@asynccontextmanager
async def _running(context: AppContext) -> AsyncIterator[None]:
    """What runs and is open as long as the application."""
    calibration = context.calibration
    if calibration is not None:
        calibration.start()
    if context.live is not None:
        context.live.start()
    if context.warnings is not None:
        logging.getLogger().addHandler(context.warnings)
    try:
        yield
    finally:
        if context.live is not None:
            context.live.close()
        if context.warnings is not None:
            logging.getLogger().removeHandler(context.warnings)
        if calibration is not None:
            await calibration.stop()
        context.prompts.close()
        context.bodies.close()
        if context.response_store is not None:
            context.response_store.close()


def _with_page(context: AppContext) -> AppContext:
    """The same with what the page needs."""
    live = LiveFeed(lambda: page.live_report(context), History(context.engine.status))
    return replace(context, sessions=PageSessions(context.config.http.port), live=live, warnings=WarningLog())


def _response_store(config: ServerConfig) -> ResponseStore | None:
    http = config.http
    if not http.store_responses:
        return None
    return ResponseStore(user_data_dir(config) / STORE_FILE, http.max_stored_responses, http.max_stored_bytes)


def _add_routes(app: FastAPI, context: AppContext, rules: CallerRules) -> None:
    keys, sessions = context.keys, context.sessions

    def has_session(connection: HTTPConnection) -> bool:
        return sessions is not None and sessions.of(connection) is not None

    async def any_key(connection: HTTPConnection) -> None:
        if not holds_key(connection, keys):
            rules.check(connection)

    async def api_key(connection: HTTPConnection) -> None:
        if not has_session(connection):
            check_api_key(connection, keys)
        await any_key(connection)

    async def admin_key(connection: HTTPConnection) -> None:
        if has_session(connection):
            rules.check(connection)
        else:
            check_admin(connection, keys)

    checks = {"api": [Depends(api_key)], "admin": [Depends(admin_key)], "none": [Depends(any_key)]}
    for group in ROUTES:
        app.include_router(group.router, dependencies=checks[group.key])


def _add_cors(app: FastAPI, config: HTTPConfig) -> None:
    """Let the configured web pages read answers; "localhost" stands for every page of this machine."""
    origins = [origin for origin in config.cors_origins if origin != "localhost"]
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_origin_regex=LOCAL_PAGES.pattern if "localhost" in config.cors_origins else None,
            allow_methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )


class HTTPServer(uvicorn.Server):
    """uvicorn's server, which also says on which port it listens, and ends when the requests have ended.

    Args:
        on_listening: called with the port once requests can come.
        drain: blocks until every request has had its last event.
        live: the feed of open pages.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[int], None],
        drain: Callable[[], object] | None,
        live: LiveFeed | None,
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._drain = drain
        self._live = live

    async def main_loop(self) -> None:
        """Serve until told to end; then still listen, so that newcomers hear why, until the last request has ended."""
        await super().main_loop()
        if self._drain is not None:
            draining = threading.Thread(target=self._drain, name="drain", daemon=True)
            draining.start()
            while draining.is_alive() and not self.force_exit:
                await asyncio.sleep(0.05)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """End the streams of open pages, which would never end, then everything else."""
        if self._live is not None:
            self._live.close()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, then tell the port."""
        await super().startup(sockets)
        if self.started:
            self._on_listening(self.servers[0].sockets[0].getsockname()[1])


def http_server(
    app: FastAPI,
    config: ServerConfig,
    on_listening: Callable[[int], None] = lambda port: None,
    drain: Callable[[], object] | None = None,
) -> HTTPServer:
    """A server for `app`, without uvicorn's log configuration.

    Forwarding headers are never believed (`proxy_headers` off).

    Args:
        on_listening: called with the port once requests can come.
        drain: called when the server is to end, and to return when every request has had its last event.
    """
    return HTTPServer(
        LimitedConfig(
            app,
            limits=ConnectionLimits(connections_within(raise_descriptor_limit(), config.http.max_connections)),
            host=config.http.host,
            port=config.http.port,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=CLOSING_S,
        ),
        on_listening,
        drain,
        app.state.context.live,
    )
