"""POST /v1/responses: through the openai package over a real socket, and every kind of item."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseReasoningItem
from pydantic import TypeAdapter

from server.engine.request import FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from server.http.answer_state import AnswerState
from server.http.formats.responses import ResponsesFormat
from server.http.requests import PreparedAnswer
from server.http.schemas.base import parse_body
from server.http.schemas.responses import ResponseBody, read_input
from server.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, serve
from tests.server.http.test_errors import error_of

URL = "/v1/responses"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
DELTAS: list[tuple[Delta, ...]] = [
    (ReasoningDelta("Hm"), ReasoningDelta("m.")),
    (ContentDelta("I look."), ToolCallStart(0, "call_1", "look")),
    (ToolCallArguments(0, '{"a"'), ToolCallArguments(0, ": 1}"), ToolCallEnd(0)),
]


def test_the_openai_package_reads_answers_and_streams(engine: FakeEngine) -> None:
    with serve(engine) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        whole = client.responses.create(model="fake/model", input="Hi", instructions="Be brief.")
        assert whole.output_text == TEXT and whole.status == "completed"
        assert whole.usage is not None and whole.usage.output_tokens == 10
        events = list(client.responses.create(model="fake/model", input="Hi", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
    assert events[-1].type == "response.completed" and events[-1].response.output_text == TEXT


def told(deltas: list[tuple[Delta, ...]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    body = parse_body(ResponseBody, b'{"input": "Hi"}').body
    request = GenerationRequest("resp_1", (1, 2), SamplingParams(), 9)
    form = ResponsesFormat(PreparedAnswer("resp_1", 1, "m", "fp", (request,), ()), body)
    answer = AnswerState([request])
    frames = [*form.opening(answer)]
    for some in deltas:
        frames += form.output(answer.add_token(0, TokenEvent("resp_1", 0, some, 1)), answer)
    frames += form.finish(answer.add_finish(0, FinishEvent("resp_1", 0, "tool_calls", True, 2, 0, 3, 1)), answer)
    frames += form.ending(answer)
    return [dict(frame.data) for frame in frames], form.whole(answer)


def test_reasoning_text_and_calls_are_items_in_their_order() -> None:
    _, whole = told(DELTAS)
    response = TypeAdapter(Response).validate_python(whole)
    reasoning, message, call = response.output
    assert isinstance(reasoning, ResponseReasoningItem) and reasoning.content is not None
    assert reasoning.content[0].text == "Hmm." and response.output_text == "I look."
    assert isinstance(call, ResponseFunctionToolCall) and (call.name, call.arguments) == ("look", '{"a": 1}')
    assert message.id != call.id and response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 1


def test_every_item_is_opened_filled_and_closed_before_the_next() -> None:
    events, whole = told(DELTAS)
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert [k for k in kinds if k.startswith("output_item")] == ["output_item.added", "output_item.done"] * 3
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert done == whole["output"] == events[-1]["response"]["output"]
    arguments = "".join(e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta")
    assert arguments == '{"a": 1}'


def test_items_of_one_turn_become_one_message() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hmm."}]},
        {"type": "function_call", "id": "x", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sea"}]},
    ]
    user, assistant, result = read_input(items)
    assert user == {"role": "user", "content": "Hi"} and assistant["reasoning_content"] == "Hmm."
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"] == "c1" and result["content"] == "sea"


@pytest.mark.anyio
async def test_what_a_coding_agent_sends_is_taken(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {
        "instructions": "A.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "B."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        ],
        "tools": [TOOL, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": [{**TOOL, "name": "go"}]}],
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "client_metadata": {},
    }
    answer = await client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    assert [t["name"] for t in answer.json()["tools"]] == ["look", "go"]
    assert "web_search" in answer.headers["x-vecinfer-ignored"]
    assert engine.tokenizer.decode(engine.submitted[0].prompt).count("system\n") == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "wizard"}]}, "input[0].role"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_what_cannot_be_had_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(await client.post(URL, json={"input": "a", **fields}), 400)["param"] == param
