"""The logging set-up: rotation, one place for each record, nothing twice."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import LogConfig
from server.errors import ConfigError
from server.terminal.log import JOINED, MAX_STREAM_BYTES, OncePerSecond, setup_logging


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_file_rotates_and_keeps_the_configured_number(tmp_path: Path) -> None:
    setup_logging(LogConfig(file=tmp_path / "logs" / "server.log", max_bytes=500, num_backups=2), terminal=False)
    for number in range(100):
        logging.getLogger("server.engine").info("step %d", number)
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["server.log", "server.log.1", "server.log.2"]
    assert all(path.stat().st_size <= 500 for path in (tmp_path / "logs").iterdir())
    assert "server.engine: step 99" in (tmp_path / "logs" / "server.log").read_text()


def test_setting_up_twice_logs_once_and_uvicorn_joins(tmp_path: Path) -> None:
    for name in JOINED:
        logging.getLogger(name).addHandler(logging.StreamHandler())
    for name in ("old.log", "new.log"):
        setup_logging(LogConfig(file=tmp_path / name), terminal=False)
    logging.getLogger("uvicorn.error").info("started")
    assert (tmp_path / "old.log").read_text() == ""
    assert (tmp_path / "new.log").read_text().count("started") == 1


def test_level_is_obeyed_and_chatter_left_out(tmp_path: Path) -> None:
    setup_logging(LogConfig(file=tmp_path / "a.log", level="debug"), terminal=False)
    logging.getLogger("server").debug("fine")
    logging.getLogger("httpx").info("HTTP Request: GET ...")
    assert "fine" in (tmp_path / "a.log").read_text()
    assert "HTTP Request" not in (tmp_path / "a.log").read_text()


def test_unwritable_file_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log\.file: cannot write"):
        setup_logging(LogConfig(file=tmp_path / "file" / "server.log"), terminal=False)


def test_a_daemons_standard_error_gets_no_records_and_is_cut(tmp_path: Path) -> None:
    err = tmp_path / "startup.err"
    err.write_bytes(b"x" * (MAX_STREAM_BYTES + 1))
    program = (
        "import logging; from pathlib import Path; from server.config import LogConfig; "
        "from server.terminal.log import setup_logging; "
        f"setup_logging(LogConfig(file=Path({str(tmp_path / 'server.log')!r}))); "
        "logging.error('ordinary'); logging.critical('the end')"
    )
    with err.open("ab") as stream:
        subprocess.run([sys.executable, "-c", program], stderr=stream, check=True, cwd=Path(__file__).parents[3])
    assert "the end" in err.read_text() and "ordinary" not in err.read_text()
    assert err.stat().st_size < 1000
    assert "ordinary" in (tmp_path / "server.log").read_text()


def test_a_repeating_error_is_one_line_a_second() -> None:
    once = OncePerSecond()
    logger = logging.Logger("of the test")

    def passes(message: str, argument: int, at_s: float, level: int = logging.ERROR) -> str | None:
        record = logger.makeRecord(logger.name, level, __file__, 1, message, (argument,), None)
        record.created = at_s
        return record.getMessage() if once.filter(record) else None

    assert passes("no room for %d", 1, 10.0) == "no room for 1"
    assert [passes("no room for %d", i, 10.0 + i / 1000) for i in range(900)] == [None] * 900
    assert passes("another %d", 1, 10.5) == "another 1"
    assert passes("no room for %d", 5, 11.1) == "no room for 5 (and 900 more like it)"
    assert passes("no room for %d", 6, 12.2) == "no room for 6"
    assert all(passes("all well %d", i, 10.0, logging.INFO) for i in range(5))
    # A clock set back says nothing about the past.
    assert passes("no room for %d", 7, 3.0) == "no room for 7"
