"""Anthropic's own client as the judge of shapes, events and error classes, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import MessageParam, ToolParam

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, serve
from tests.server.http.test_messages import THOUGHTFUL

MESSAGES: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: ToolParam = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def sdk(engine: FakeEngine) -> Iterator[Anthropic]:
    with serve(engine) as port, Anthropic(base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0) as client:
        yield client


def test_a_message(sdk: Anthropic) -> None:
    answer = sdk.messages.create(model="claude-local", max_tokens=50, messages=MESSAGES)
    assert [block.text for block in answer.content if block.type == "text"] == [TEXT]
    assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 10)


def test_a_stream_gathers_the_same_message(sdk: Anthropic, engine: FakeEngine) -> None:
    engine.script.cached_tokens = 3
    whole = sdk.messages.create(model="demo", max_tokens=50, messages=MESSAGES)
    with sdk.messages.stream(model="demo", max_tokens=50, messages=MESSAGES) as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert final.to_dict()["content"] == whole.to_dict()["content"]
    assert final.usage.cache_read_input_tokens == 3 and final.usage.input_tokens == whole.usage.input_tokens


def test_thinking_and_a_call_stream_and_go_round(sdk: Anthropic, engine: FakeEngine) -> None:
    engine.script.pieces = THOUGHTFUL
    with sdk.messages.stream(
        model="demo", max_tokens=50, messages=MESSAGES, tools=[TOOL], thinking={"type": "adaptive"}
    ) as stream:
        final = stream.get_final_message()
    thinking, text, call = final.content
    assert thinking.type == "thinking" and thinking.thinking == "Hmm." and thinking.signature
    assert text.type == "text" and call.type == "tool_use"
    assert (call.input, final.stop_reason) == ({"city": "Paris"}, "tool_use")
    history: list[MessageParam] = [
        *MESSAGES,
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "18"}]},
    ]
    assert sdk.messages.create(model="demo", max_tokens=50, messages=history, tools=[TOOL]).content


def test_counting_and_listing(sdk: Anthropic) -> None:
    assert sdk.messages.count_tokens(model="demo", messages=MESSAGES).input_tokens > 5
    assert [model.id for model in sdk.models.list()] == ["fake/model"]


def test_errors_are_the_clients_own_classes(sdk: Anthropic, engine: FakeEngine) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        sdk.messages.create(model="demo", max_tokens=-5, messages=MESSAGES)
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(model="other", max_tokens=5, messages=MESSAGES)
    engine.script.error_after = 1
    with pytest.raises(anthropic.APIStatusError, match="the model broke"):
        list(sdk.messages.create(model="demo", max_tokens=50, messages=MESSAGES, stream=True))
