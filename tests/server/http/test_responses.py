"""POST /v1/responses: through the openai package over a real socket, and every kind of item."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseReasoningItem, ResponseStreamEvent
from pydantic import TypeAdapter

from server.engine.request import FinishEvent, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.http.answer_state import AnswerState
from server.http.formats.responses import ResponsesFormat
from server.http.requests import PreparedAnswer
from server.http.schemas.base import parse_body
from server.http.schemas.response_items import InputItem, to_messages
from server.http.schemas.responses import ResponseBody
from server.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, eventually, serve
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


def told(
    deltas: list[tuple[Delta, ...]], reason: FinishReason = "tool_calls", **fields: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    body = parse_body(ResponseBody, json.dumps({"input": "Hi", **fields}).encode()).body
    request = GenerationRequest("resp_1", (1, 2), SamplingParams(), 9)
    form = ResponsesFormat(PreparedAnswer("resp_1", 1, "m", "fp", (request,), ()), body)
    answer = AnswerState([request])
    frames = [*form.opening(answer)]
    for some in deltas:
        frames += form.output(answer.add_token(0, TokenEvent("resp_1", 0, some, 1)), answer)
    frames += form.finish(answer.add_finish(0, FinishEvent("resp_1", 0, reason, True, 2, 0, 3, 1)), answer)
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
    user, assistant, result = to_messages([InputItem.model_validate(item) for item in items], {})
    assert user == {"role": "user", "content": "Hi"} and assistant["reasoning_content"] == "Hmm."
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"] == "c1" and result["content"] == "sea"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [({}, "missing_required_parameter", "is required"), ({"input": []}, "invalid_value", "it is empty")],
)
async def test_no_input_and_an_empty_one_are_told_apart(
    client: httpx.AsyncClient, fields: dict[str, object], code: str, said: str
) -> None:
    error = (await client.post(URL, json=fields)).json()["error"]
    assert error["param"] == "input" and error["code"] == code and said in error["message"]
    assert (await client.post(URL, json={**fields, "instructions": "Say hello."})).status_code == 200


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
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.json_schema.schema"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_what_cannot_be_had_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(await client.post(URL, json={"input": "a", **fields}), 400)["param"] == param


EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_every_event_has_the_packages_form(reason: FinishReason) -> None:
    events, _ = told(DELTAS, reason, reasoning={"summary": "auto"}, tools=[TOOL], top_logprobs=1)
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]


def test_an_answer_that_is_cut_says_so() -> None:
    events, whole = told(DELTAS[:2], "length")
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in whole["output"]] == ["completed", "completed", "incomplete"]
    assert events[-1]["type"] == "response.incomplete" and events[-2]["item"]["status"] == "incomplete"


def test_thinking_is_told_as_summary_and_sealed_when_asked_for() -> None:
    events, whole = told(DELTAS, reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"])
    item = whole["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "Hmm."}]
    said = "".join(e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta")
    assert said == "Hmm."
    given_back = InputItem.model_validate({"type": "reasoning", "encrypted_content": item["encrypted_content"]})
    assert given_back.thinking == "Hmm." and "encrypted_content" not in told(DELTAS)[1]["output"][0]


@pytest.mark.parametrize("content", ["gAAAAB", "vecinfer-text:?", "vecinfer-text:/w==", ""])
def test_thinking_sealed_by_others_is_left_out(content: str) -> None:
    item = InputItem.model_validate({"type": "reasoning", "summary": [], "encrypted_content": content})
    assert to_messages([item], {}) == ()


def test_a_function_of_a_namespace_is_called_by_its_own_name() -> None:
    tools = [TOOL, {"type": "namespace", "name": "sea", "tools": [TOOL]}]
    call: tuple[Delta, ...] = (ToolCallStart(0, "c1", "sea.look"), ToolCallEnd(0))
    _, whole = told([call], tools=tools)
    item = whole["output"][0]
    assert (item["namespace"], item["name"]) == ("sea", "look")
    body = parse_body(ResponseBody, json.dumps({"input": [item], "tools": tools}).encode()).body
    message = body.conversation(body.input).messages[0]
    assert message["tool_calls"][0]["function"]["name"] == "sea.look"


def test_what_was_asked_for_is_told_back() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}
    asked: dict[str, Any] = {
        "metadata": {"a": "b"},
        "user": "u",
        "text": {"format": schema},
        "tool_choice": allowed,
        "tools": [TOOL],
    }
    _, whole = told(DELTAS, **asked)
    assert whole["text"] == {"format": schema, "verbosity": "medium"}
    assert (whole["metadata"], whole["user"], whole["tool_choice"]) == ({"a": "b"}, "u", allowed)


@pytest.mark.anyio
async def test_log_probabilities_stand_by_their_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pieces = (ReasoningDelta("Hm"), "a", "b")
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    part = (await client.post(URL, json=body)).json()["output"][1]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"]
    assert len(part["logprobs"][0]["top_logprobs"]) == 1
    part = (await client.post(URL, json={"input": "Hi"})).json()["output"][1]["content"][0]
    assert part["logprobs"] == []


def test_a_stream_that_fails_ends_in_a_failed_response(engine: FakeEngine) -> None:
    engine.script.error_after = 2
    with serve(engine) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        *_, error, failed = client.responses.create(model="fake/model", input="Hi", stream=True)
    assert error.type == "error" and error.message == "the model broke"
    assert failed.type == "response.failed" and failed.response.error is not None
    assert failed.response.error.code == "server_error" and failed.response.output_text == "The capital"


def test_the_packages_accumulating_stream_sees_the_same(engine: FakeEngine) -> None:
    engine.script.pieces = (ReasoningDelta("Hm"), "a", ToolCallStart(0, "c", "look"), ToolCallArguments(0, "{}"))
    with serve(engine) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        with client.responses.stream(model="fake/model", input="Hi", tools=[TOOL]) as stream:  # type: ignore[list-item]
            final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "a"


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_response_is_cancelled(engine: FakeEngine, stream: bool) -> None:
    engine.script.token_delay_s = 60.0
    with serve(engine) as port, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}{URL}"
        answer = pool.submit(httpx.post, url, json={"input": "Hi", "stream": stream}, timeout=10)
        eventually(lambda: len(engine.submitted) == 1, "the request arrives")
        name = engine.submitted[0].request_id
        assert httpx.get(f"{url}/{name}").json()["status"] == "in_progress"
        assert httpx.post(f"{url}/{name}/cancel").json()["status"] == "cancelled"
        text = answer.result().text
    assert engine.aborted == {name: "cancelled"}
    assert '"status":"cancelled"' in text and answer.result().status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "end"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")])
async def test_without_a_store_no_response_is_there(client: httpx.AsyncClient, method: str, end: str) -> None:
    made = (await client.post(URL, json={"input": "Hi", "store": True})).json()
    assert made["store"] is False
    error = error_of(await client.request(method, f"{URL}/{made['id']}{end}"), 404)
    assert error["code"] == "response_not_found" and "http.store_responses" in error["message"]
