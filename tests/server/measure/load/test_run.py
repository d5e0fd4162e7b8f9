"""A load test over real sockets and a real engine: it counts what the server counted, and names what fails."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import build_app
from server.measure.load.client import Exchange, LoadTarget, ask
from server.measure.load.summary import percentiles
from server.measure.load.workload import LoadCase, TextSource
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer
from tests.server.engine.harness import serving
from tests.server.http.conftest import serve


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model, tokenizer = build_tiny_model("llama"), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with serving(model, tokenizer) as engine, serve(engine) as port:
        yield f"http://127.0.0.1:{port}"


def _load(url: str, path: Path, *options: str) -> list[dict[str, Any]]:
    command = ["bench", "serve", "--url", url, "--max-tokens", "6", "--json", str(path), *options]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_every_kind_of_traffic_and_arrival_is_counted(url: str, tmp_path: Path) -> None:
    options = ("--kinds", "completions,chat", "--prompts", "60", "--streams", "1,3", "--rates", "50", "--requests", "4")
    rows = _load(url, tmp_path / "r.json", *options, "--against", url, "--plot", str(tmp_path / "r.png"))
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert [(r["case"], r["arrivals"]) for r in rows[::2]] == [
        (f"{kind} 60", arrivals) for kind in ("completions", "chat") for arrivals in ("1 streams", "3 streams", "50/s")
    ]
    for row in rows:
        assert row["errors"] == {} and row["num_requests"] == 4 and row["generated_tokens"] == 24
        assert row["prompt_tokens"] > 4 * 45 and 0 < row["first_s"]["p50"] <= row["total_s"]["max"]
        assert row["generated_per_s"] == pytest.approx(24 / row["duration_s"])
    # The servers take turns on the same prompts, and here they are one server: the second time they are known.
    assert [r["prompt_tokens"] for r in rows[::2]] == [r["prompt_tokens"] for r in rows[1::2]]


def test_a_conversation_grows_and_what_is_known_of_it_is_told(url: str, tmp_path: Path) -> None:
    source = TextSource(3)
    script = source.scripts(LoadCase("agent", 0, turns=3), 1)[0]
    assert [len(script.body(["a"] * turn)["messages"]) for turn in range(3)] == [2, 4, 6]
    (row,) = _load(
        url, tmp_path / "r.json", "--kinds", "shared", "--shared", "300", "--streams", "1", "--requests", "3"
    )
    assert row["errors"] == {} and row["cached_tokens"] > 2 * 200


def test_a_refusal_is_an_error_with_its_message_and_no_figure(url: str, tmp_path: Path) -> None:
    (row,) = _load(url, tmp_path / "r.json", "--kinds", "completions", "--prompts", "9000", "--streams", "2")
    ((message, count),) = row["errors"].items()
    assert message.startswith("HTTP 400: this model's context is") and count == 8
    assert row["first_s"] == {} and row["generated_tokens"] == 0


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (['{"choices":[{"text":"a"}]}'], "the stream was cut off"),
        (['{"choices":[{"text":"a"}]}', '{"error":{"message":"it broke"}}'], "in the stream: it broke"),
        (['{"choices":[{"text":"a"}]}', '{"choices":[],"usage":{"prompt_tokens":7}}', "[DONE]"], None),
    ],
)
def test_an_answer_that_does_not_end_is_not_counted_as_one(frames: list[str], error: str | None) -> None:
    with _stream(frames) as url:
        exchange = asyncio.run(_ask(url))
    assert (exchange.error, exchange.text) == (error, "a")
    assert exchange.num_prompt == (7 if error is None else 0)


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([]) == {}
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@pytest.mark.parametrize("option", [("--streams", "0"), ("--kinds", "songs"), ("--extra", "[]"), ("--streams", "")])
def test_what_cannot_be_run_is_refused_before_anything_is_sent(option: tuple[str, str]) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "serve", "--url", "http://127.0.0.1:9", *option])
    assert result.exit_code != 0 and option[0] in result.output


async def _ask(url: str) -> Exchange:
    target = LoadTarget("it", url, "m", {}, {})
    async with target.client(5) as client:
        return await ask(client, target, "completions", {"prompt": "x"})


@contextmanager
def _stream(frames: list[str]) -> Iterator[str]:
    """A server that answers everything with these frames and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            for frame in frames:
                self.wfile.write(f"data: {frame}\n\n".encode())

        def log_message(self, format: str, *args: Any) -> None:
            """No log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
