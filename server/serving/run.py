"""`vecinfer serve`: the MLX thread, the HTTP server, and their orderly end."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial

from fastapi import FastAPI
from rich.console import Console

from quant_core.artifact.store import ArtifactStore
from quant_core.slices import Progress, mapped
from server.access.keys import AccessKeys, check_open, server_keys
from server.access.local_servers import announced
from server.calibration.agreement import agreement_line
from server.calibration.artifacts import CalibrationTarget
from server.calibration.procedure import calibration_slices
from server.calibration.queue import CalibrationQueue
from server.calibration.refiner import Refiner
from server.config import LogConfig, ServerConfig, user_data_dir
from server.engine.loop import EngineLoop
from server.engine.scheduler import Loaded
from server.errors import ConfigError
from server.http.app import create_app, http_server
from server.memory.limits import is_out_of_memory
from server.model.wheel import Report
from server.serving.startup import StartedModel, check_settings, start_up
from server.terminal.log import setup_logging
from server.terminal.progress import report_progress

log = logging.getLogger(__name__)


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop.

    Raises:
        ConfigError: keys, log file or back end are not as configured; nothing was started.
    """
    setup_logging(config.log)
    check_settings(config)
    keys = server_keys(config)
    check_open(config, keys)
    console = Console(stderr=True, soft_wrap=True)
    engine, app = assemble(config, keys, console)
    with ExitStack() as stack:
        server = http_server(
            app,
            config,
            on_listening=lambda port: stack.enter_context(announced(config, port, keys.admin_file)),
            drain=engine.shutdown,
        )
        engine.start()
        stack.callback(engine.shutdown)
        # On SIGTERM or SIGINT the engine drains, then the sockets close; a second SIGINT does not wait.
        server.run()


def assemble(config: ServerConfig, keys: AccessKeys, console: Console) -> tuple[EngineLoop, FastAPI]:
    """The engine, which is not started, and the application on it."""
    artifacts = ArtifactStore(user_data_dir(config) / "artifacts")
    target: Future[CalibrationTarget] = Future()

    def startup() -> Generator[Progress, None, Loaded]:
        with report_progress(console) as report:
            started = yield from _in_memory(mapped(start_up(config, artifacts, report), partial(_shown, report)))
        announce(banner(config, started, keys), console, config.log)
        if started.target is not None:
            target.set_result(started.target)
        return started.loaded

    engine = EngineLoop(config, startup)
    packed = config.kv_cache.method == "vecinfer"
    # A codec that was fitted on the user's own text is not measured on the built-in one.
    refines = config.calibration.refine == "idle" and config.calibration.text is None
    refiner = Refiner(engine, artifacts, config) if refines else None
    calibration = CalibrationQueue(engine, artifacts, calibration_slices, target, refiner) if packed else None
    return engine, create_app(config, engine, keys=keys, calibration=calibration)


def banner(config: ServerConfig, started: StartedModel, keys: AccessKeys) -> list[str]:
    """What is served, how its cache is packed, what was asked for, and a curl to try."""
    loaded = started.loaded
    url = f"http://{config.http.host}:{config.http.port}"
    lines = [f"{loaded.model_id}, context {loaded.context_len:,} tokens, at {url}/v1", started.summary]
    if loaded.store is None:
        return [*lines, f"not ready: {loaded.detail}"]
    if config.kv_cache.method == "vecinfer":
        lines.append(agreement_line(config, loaded.store.usage().codec))
    body = f'{{"model":"{loaded.model_id}","messages":[{{"role":"user","content":"What is the capital of France?"}}]}}'
    key = ' -H "Authorization: Bearer $KEY"' if keys.api else ""
    if config.http.page:
        lines.append(f"page: {url}/ (vecinfer open logs in)")
    if keys.admin_file is not None:
        lines.append(f"key of the admin routes: {keys.admin_file}")
    return [*lines, f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"]


def announce(lines: Iterable[str], console: Console, config: LogConfig) -> None:
    """Say it on standard error, and in the log file if there is one; at a terminal the log shows its records itself."""
    logged = config.file is not None and log.isEnabledFor(logging.INFO)
    for line in lines:
        if logged:
            log.info("%s", line)
        if not (logged and console.is_terminal):
            console.print(line, highlight=False, markup=False)


def _in_memory(slices: Generator[Progress, None, StartedModel]) -> Generator[Progress, None, StartedModel]:
    """The same slices; raises ConfigError where an allocation is refused."""
    try:
        return (yield from slices)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"there is no memory for the model and its caches: {error or 'an allocation was refused'}; serve a smaller "
            "or more strongly quantised model, lower kv_cache.pool_bytes, or free memory"
        ) from error


def _shown(report: Report, progress: Progress) -> Progress:
    """The same progress, shown on the terminal."""
    plain = progress.phase in ("load", "selftest")
    report(progress.detail if plain else f"calibrating: {progress.detail}", progress.fraction)
    return progress
