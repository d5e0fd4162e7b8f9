"""The routes over the real engine and a tiny random model with float16 caches: do the two halves fit?"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from quant_core.cache.plain_store import PlainStore
from server.config import EngineConfig, ServerConfig
from server.engine.loop import EngineLoop, Loaded
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer
from tests.server.http.conftest import AS_ADMIN, eventually, serve
from tests.server.http.test_hang_up import send

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class Loading:
    phase: str = "load"
    detail: str = "tiny"
    fraction: float = 0.5


@dataclass(frozen=True)
class Running:
    engine: EngineLoop
    client: httpx.Client
    port: int

    def chat(self, **fields: Any) -> dict[str, Any]:
        answer = self.client.post(CHAT, json={"messages": USER, "temperature": 0, "max_tokens": 24, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tokenizer")

    def start_up() -> Generator[Loading, None, Loaded]:
        yield Loading()
        model = build_tiny_model("llama")
        store: Any = PlainStore(model, 200 << 20, 8)
        return Loaded(model, tiny_tokenizer(folder), "tiny", 2048, store)

    config = ServerConfig(engine=EngineConfig(max_num_seqs=8))
    ends: list[int] = []
    engine = EngineLoop(config, start_up, exit_process=ends.append)
    engine.start()
    try:
        with serve(engine) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            eventually(lambda: client.get("/readyz").status_code == 200, "readiness", timeout_s=20)
            yield Running(engine, client, port)
    finally:
        engine.shutdown(0)
    assert ends == []


def text_of(stream: str) -> str:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_stream_equals_whole_answer(server: Running) -> None:
    whole = server.chat()
    assert whole["usage"]["completion_tokens"] <= 24 and whole["choices"][0]["message"]["content"]
    body = {"messages": USER, "temperature": 0, "max_tokens": 24, "stream": True}
    assert text_of(server.client.post(CHAT, json=body).text) == whole["choices"][0]["message"]["content"]


def test_a_seed_repeats_and_choices_differ(server: Running) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": -7, "n": 3}
    first, second = ([c["message"]["content"] for c in server.chat(**fields)["choices"]] for _ in range(2))
    assert first == second and len(set(first)) == 3


def test_logprobs_concatenate_to_the_text(server: Running) -> None:
    choice = server.chat(logprobs=True, top_logprobs=2)["choices"][0]
    tokens = choice["logprobs"]["content"]
    text = b"".join(bytes(t["bytes"]) for t in tokens).decode("utf-8", "replace")
    assert text == choice["message"]["content"]
    assert all(len(t["top_logprobs"]) == 2 and -math.inf < t["logprob"] <= 0 for t in tokens)
    assert all(t["logprob"] == t["top_logprobs"][0]["logprob"] for t in tokens)


def test_a_stop_string_never_shows(server: Running) -> None:
    text = server.chat()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    choice = server.chat(stop=stop)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == text[: text.index(stop)]


def test_usage_counts_the_token_that_ends_the_answer_and_log_probabilities_do_not(server: Running) -> None:
    """As OpenAI has it: `content` is the text's, `completion_tokens` is what was generated (docs/api.md)."""
    end = server.client.post("/v1/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"]
    assert len(end) == 1
    ended = server.chat(logprobs=True, logit_bias={str(end[0]): 100}, max_tokens=4)
    cut = server.chat(logprobs=True, ignore_eos=True, max_tokens=4)
    for answer, reason, num_end_tokens in ((ended, "stop", 1), (cut, "length", 0)):
        choice = answer["choices"][0]
        assert choice["finish_reason"] == reason
        num_text_tokens = len((choice["logprobs"] or {"content": []})["content"] or [])
        assert answer["usage"]["completion_tokens"] == num_text_tokens + num_end_tokens
    assert cut["usage"]["completion_tokens"] == 4


def test_a_shared_system_message_is_resumed(server: Running) -> None:
    system = {"role": "system", "content": "word " * 300}
    first = server.chat(messages=[system, *USER])
    second = server.chat(messages=[system, {"role": "user", "content": "And of Spain?"}])
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 300


def test_list_prompts_and_token_ids(server: Running) -> None:
    body = {"prompt": ["one", [5, 6, 7]], "max_tokens": 4, "temperature": 0, "logprobs": 1}
    answer = server.client.post(TEXT, json=body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert all(len(c["logprobs"]["tokens"]) <= 4 for c in answer["choices"])


def test_what_can_never_fit_is_refused(server: Running) -> None:
    answer = server.client.post(CHAT, json={"messages": [{"role": "user", "content": "x y z " * 3000}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    answer = server.client.post(CHAT, json={"messages": USER, "n": 16})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("stream", [False, True])
def test_hang_up_frees_the_row(server: Running, stream: bool) -> None:
    connection = send(server.port, {"messages": USER, "max_tokens": 1900, "ignore_eos": True, "stream": stream})
    eventually(lambda: server.engine.status().num_running == 1, "the request runs")
    connection.close()
    eventually(lambda: server.engine.status().num_running == 0, "the row is free", timeout_s=1.0)


def test_status_and_metrics_of_the_real_engine(server: Running) -> None:
    server.chat()
    status = server.client.get("/admin/status", headers=AS_ADMIN).json()
    assert status["kv"]["method"] == "fp16" and status["layers"]["total"] == 2
    text = server.client.get("/metrics").text
    assert "vecinfer_step_seconds_bucket" in text and 'vecinfer_engine_state{state="ready"} 1.0' in text
