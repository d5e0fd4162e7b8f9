"""`vecinfer serve`: the MLX thread, the HTTP server, and their orderly end."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable

from rich.console import Console

from quant_core.artifact.store import ArtifactStore
from quant_core.calibrate.procedure import Progress
from server.calibration.procedure import calibration_slices
from server.calibration.queue import CalibrationService, CalibrationTarget
from server.config import LogConfig, ServerConfig, load_keys, user_data_dir
from server.engine.loop import EngineLoop
from server.engine.scheduler import Loaded
from server.http.app import create_app, http_server
from server.model.wheel import Report
from server.serving.startup import Assembly, check_device, start_up
from server.terminal.log import setup_logging
from server.terminal.progress import report_progress

log = logging.getLogger(__name__)


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop.

    Raises:
        ConfigError: keys, log file or back end are not as configured; nothing was started.
    """
    setup_logging(config.log)
    check_device(config)
    keys = load_keys(config)
    artifacts = ArtifactStore(user_data_dir(config) / "artifacts")
    assembly = Assembly(config, artifacts)
    console = Console(stderr=True, soft_wrap=True)
    calibration: CalibrationService | None = None

    def startup() -> Generator[Progress, None, Loaded]:
        with report_progress(console) as report:
            loaded = yield from _reported(start_up(assembly, report), report)
        if calibration is not None and assembly.model is not None:
            calibration.bind(
                CalibrationTarget(
                    assembly.model.model,
                    assembly.model.tokenizer,
                    assembly.fingerprint,
                    assembly.make_store,
                    assembly.unproven,
                )
            )
        announce(banner(config, loaded, assembly), console, config.log)
        return loaded

    engine = EngineLoop(config, startup)
    if config.kv_cache.method == "vecinfer":
        calibration = CalibrationService(engine, artifacts, calibration_slices)
    server = http_server(create_app(config, engine, keys=keys, calibration=calibration), config)
    engine.start()
    try:
        # uvicorn handles SIGTERM and SIGINT: it stops accepting, waits for open answers, then returns.
        server.run()
    finally:
        engine.shutdown()


def banner(config: ServerConfig, loaded: Loaded, assembly: Assembly) -> list[str]:
    """What is served, how its cache is packed, and a curl to try."""
    url = f"http://{config.http.host}:{config.http.port}"
    lines = [f"{loaded.model_id}, context {loaded.context_len:,} tokens, at {url}/v1"]
    lines += assembly.summary
    if loaded.store is None:
        return [*lines, f"not ready: {loaded.detail}"]
    body = f'{{"model":"{loaded.model_id}","messages":[{{"role":"user","content":"What is the capital of France?"}}]}}'
    key = ' -H "Authorization: Bearer $KEY"' if load_keys(config).api else ""
    return [*lines, f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"]


def announce(lines: Iterable[str], console: Console, config: LogConfig) -> None:
    """Say it on standard error, and in the log file if there is one; at a terminal the log shows its records itself."""
    logged = config.file is not None and log.isEnabledFor(logging.INFO)
    for line in lines:
        if logged:
            log.info("%s", line)
        if not (logged and console.is_terminal):
            console.print(line, highlight=False, markup=False)


def _reported(slices: Generator[Progress, None, Loaded], report: Report) -> Generator[Progress, None, Loaded]:
    """The same slices, each shown on the terminal."""
    while True:
        try:
            progress = next(slices)
        except StopIteration as stop:
            loaded: Loaded = stop.value
            return loaded
        plain = progress.phase in ("load", "selftest")
        report(progress.detail if plain else f"calibrating: {progress.detail}", progress.fraction)
        yield progress
