"""Where log records go: the server's own rotating file when `log.file` is set, and standard error.

launchd and systemd keep their standard-error file open for ever and never rotate it. So with a log file and no
terminal, standard error gets start-up failures and crashes only.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import sys
from logging.handlers import RotatingFileHandler

from rich.console import Console
from rich.logging import RichHandler

from server.config import LogConfig
from server.errors import ConfigError

LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Loggers that report every HTTP request or file lock at INFO.
CHATTY = ("httpx", "httpcore", "huggingface_hub", "urllib3", "filelock", "asyncio", "transformers")
# Libraries with handlers of their own; ours would not see their records, or see them twice.
JOINED = ("uvicorn", "uvicorn.error", "uvicorn.access")
MAX_STREAM_BYTES = 1_000_000
# Kinds of warnings that are told apart.
MAX_KINDS = 1000


class LocalTimeFormatter(logging.Formatter):
    """Local time with its offset: 2026-11-23T21:30:00+0000."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = None


class OncePerSecond(logging.Filter):
    """Lets a warning or an error through once a second, and says how many like it were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written. It is one of a kind by logger, level and unformatted message."""
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, record.levelno, str(record.msg))
        last_s, num_left_out = self._last.get(kind, (-math.inf, 0))
        if record.created - last_s < 1.0 and record.created >= last_s:
            self._last[kind] = (last_s, num_left_out + 1)
            return False
        if len(self._last) >= MAX_KINDS:
            self._last.clear()
        self._last[kind] = (record.created, 0)
        if num_left_out:
            record.msg, record.args = f"{record.getMessage()} (and {num_left_out} more like it)", ()
        return True


def setup_logging(config: LogConfig, *, terminal: bool | None = None) -> None:
    """Send all records of this process where `config` says; calling it again replaces what it set before.

    Args:
        config: level, file and rotation.
        terminal: whether standard error is a terminal; None looks.

    Raises:
        ConfigError: the log file cannot be written.
    """
    at_terminal = sys.stderr.isatty() if terminal is None else terminal
    handlers: list[logging.Handler] = [_stderr_handler(at_terminal, with_file=config.file is not None)]
    if config.file is not None:
        handlers.append(_file_handler(config))
        if not at_terminal:
            _empty_large_streams()
    root = logging.getLogger()
    names = {handler.name for handler in handlers} | {"vecinfer.file"}
    for handler in [h for h in root.handlers if h.name in names]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.addFilter(OncePerSecond())
        root.addHandler(handler)
    root.setLevel(config.level.upper())
    logging.captureWarnings(True)
    for name in JOINED:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _stderr_handler(terminal: bool, *, with_file: bool) -> logging.Handler:
    handler: logging.Handler
    if terminal:
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LocalTimeFormatter(LINE))
        if with_file:
            handler.setLevel(logging.CRITICAL)
    handler.name = "vecinfer.stderr"
    return handler


def _file_handler(config: LogConfig) -> logging.Handler:
    assert config.file is not None
    path = config.file.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=config.max_bytes, backupCount=config.num_backups, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"log.file: cannot write {path}: {error.strerror or error}") from error
    handler.setFormatter(LocalTimeFormatter(LINE))
    handler.name = "vecinfer.file"
    return handler


def _empty_large_streams() -> None:
    """Cut standard output and error back when they are files that restarts have let grow."""
    for descriptor in (1, 2):
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size > MAX_STREAM_BYTES:
                os.ftruncate(descriptor, 0)
        except OSError:  # closed, or not ours to cut: no reason not to start
            continue
