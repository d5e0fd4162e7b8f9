"""POST /v1/messages: Anthropic's bodies read, its blocks, events and errors written."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.access.keys import AccessKeys
from server.http.generation_spec import ResponseFormat
from server.http.schemas.base import ParsedBody, parse_body
from server.http.schemas.messages import MessagesBody
from server.model.conversation import Conversation, Thinking, ToolChoice
from server.output.deltas import Delta, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT, USER, in_process

pytestmark = pytest.mark.anyio
BODY: dict[str, Any] = {"messages": USER, "max_tokens": 50}
TOOL = {"name": "get_weather", "description": "Weather.", "input_schema": {"type": "object", "properties": {}}}
CALL: tuple[Delta, ...] = (
    ToolCallStart(0, "call_1", "get_weather"),
    ToolCallArguments(0, '{"city": '),
    ToolCallArguments(0, '"Paris"}'),
    ToolCallEnd(0),
)
ASIDE: tuple[str | Delta, ...] = ("\n\n", "Let me", " see.", "\n")
THOUGHTFUL = (ReasoningDelta("Hm"), ReasoningDelta("m."), *ASIDE, *CALL)


def parsed(**fields: Any) -> ParsedBody[MessagesBody]:
    return parse_body(MessagesBody, json.dumps({**BODY, **fields}).encode())


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    return parsed(messages=list(messages), **fields).body.conversation()


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/messages?beta=true", json={**BODY, **fields})


async def events(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The stream's events; each is named after its type."""
    answer = await post(client, stream=True, **fields)
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame and not frame.startswith(":")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name.removeprefix("event: ") for name, _ in frames] == [event["type"] for event in found]
    return found


def rebuilt(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks that the events tell; indices count up, and one block is open at a time."""
    blocks: list[dict[str, Any]] = []
    for event in found:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(blocks) - 1
            for field in ("text", "thinking", "signature"):
                if field in event["delta"]:
                    blocks[-1][field] += event["delta"][field]
            blocks[-1]["json"] += event["delta"].get("partial_json", "")
    for block in blocks:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    return blocks


async def test_a_message_is_answered(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.cached_tokens = 3
    answer = (await post(client)).json()
    assert answer["id"].startswith("msg_") and (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["content"] == [{"type": "text", "text": TEXT}]
    assert (answer["stop_reason"], answer["stop_sequence"], answer["model"]) == ("end_turn", None, "fake/model")
    usage = answer["usage"]
    assert usage["cache_read_input_tokens"] == 3 and usage["output_tokens"] == 10
    assert usage["input_tokens"] + 3 == len(engine.submitted[0].prompt)


async def test_a_stream_opens_with_the_prompt_and_closes_with_the_answer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.cached_tokens = 3
    found = await events(client)
    assert [found[0]["type"], found[1]["type"]] == ["message_start", "ping"]
    assert found[0]["message"]["usage"]["input_tokens"] == len(engine.submitted[0].prompt)
    assert [event["type"] for event in found[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert found[-2]["usage"]["cache_read_input_tokens"] == 3
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


async def test_thinking_text_and_a_call_are_three_blocks(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pieces = THOUGHTFUL
    answer = (await post(client, tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024})).json()
    thinking, text, call = answer["content"]
    assert (thinking["type"], thinking["thinking"], bool(thinking["signature"])) == ("thinking", "Hmm.", True)
    assert text == {"type": "text", "text": "\n\nLet me see.\n"}
    assert call == {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Paris"}}
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "pieces",
    [THOUGHTFUL, (*CALL, "\n", *CALL), ("a", ReasoningDelta(" "), "b"), (ReasoningDelta("x"), " "), (), (" ", "\n")],
)
@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "disabled"}])
async def test_a_stream_says_what_the_whole_answer_says(
    client: httpx.AsyncClient, engine: FakeEngine, pieces: tuple[str | Delta, ...], thinking: dict[str, str]
) -> None:
    engine.script.pieces = pieces
    whole = (await post(client, tools=[TOOL], thinking=thinking)).json()
    found = await events(client, tools=[TOOL], thinking=thinking)
    assert rebuilt(found) == whole["content"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]


async def test_thinking_that_was_not_asked_for_is_not_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.pieces = (ReasoningDelta("Hmm."), "Yes.")
    assert (await post(client)).json()["content"] == [{"type": "text", "text": "Yes."}]


async def test_an_answer_cut_in_a_call_keeps_what_is_complete_of_it(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.pieces = (ToolCallStart(0, "call_1", "f"), ToolCallArguments(0, '{"a": 1, "b": "un'))
    answer = (await post(client, max_tokens=2)).json()
    assert answer["content"][0]["input"] == {"a": 1}
    assert answer["stop_reason"] == "max_tokens"


async def test_a_stop_sequence_is_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.stop_sequence = "###"
    answer = (await post(client, stop_sequences=["###", ""])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "###")
    assert engine.submitted[0].stop == ("###",)


async def test_counted_tokens_are_the_prompt_of_the_answer(client: httpx.AsyncClient) -> None:
    fields = {"messages": USER, "system": [{"type": "text", "text": "Be brief."}], "tools": [TOOL]}
    counted = (await client.post("/v1/messages/count_tokens", json=fields)).json()
    answer = (await post(client, **fields)).json()
    assert counted == {"input_tokens": answer["usage"]["input_tokens"]}


async def test_max_tokens_beyond_the_context_are_cut_to_it(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await post(client, max_tokens=32000)).status_code == 200
    (request,) = engine.submitted
    assert len(request.prompt) + request.max_tokens == engine.current.context_len


async def test_names_of_claude_models_mean_the_served_model(client: httpx.AsyncClient) -> None:
    answer = await post(client, model="claude-sonnet-4-5")
    assert answer.json()["model"] == "claude-sonnet-4-5"
    refused = await post(client, model="gpt-9")
    assert refused.status_code == 404 and refused.json()["error"]["type"] == "not_found_error"


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await post(client, temperature=0.5, top_p=0.9, top_k=40)
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)


@pytest.mark.parametrize("field", ["output_config.format", "output_format"])
async def test_a_schema_holds_the_answer(client: httpx.AsyncClient, field: str) -> None:
    def given(form: dict[str, Any]) -> dict[str, Any]:
        return {"output_format": form} if field == "output_format" else {"output_config": {"format": form}}

    held = parsed(**given({"type": "json_schema", "schema": {"type": "object"}})).body.spec().response_format
    assert held == ResponseFormat("json_schema", '{"type": "object"}', param=field)
    wrong = await post(client, **given({"type": "json_schema"}))
    assert wrong.json()["error"]["message"].startswith(f"{field}.json_schema.schema")


def test_calls_and_results_become_messages_of_their_roles() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Köln"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "18"}]}
    failed = {"type": "tool_result", "tool_use_id": "t2", "content": "none", "is_error": True}
    thought = {"type": "thinking", "thinking": "Hmm.", "signature": "x"}
    messages = conversation(
        *USER,
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Wait."}, call]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, result, failed]},
    ).messages
    assert messages[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert (messages[1]["reasoning_content"], messages[1]["content"]) == ("Hmm.", "Wait.")
    assert messages[2] == {"role": "tool", "tool_call_id": "t1", "content": "18"}
    assert messages[3] == {"role": "tool", "tool_call_id": "t2", "content": "Error: none"}
    assert messages[4] == {"role": "user", "content": "And?"}


def test_system_messages_join_the_system_text_or_the_users_turn() -> None:
    first = {"role": "system", "content": "Two."}
    later = {"role": "system", "content": [{"type": "text", "text": "Agents: none."}]}
    messages = conversation(first, *USER, later, *USER, system=[{"type": "text", "text": "One."}]).messages
    question = USER[0]["content"]
    assert messages == (
        {"role": "system", "content": "One.\n\nTwo."},
        {"role": "user", "content": f"{question}\n\nAgents: none.\n\n{question}"},
    )


def test_an_assistants_text_at_the_end_is_continued() -> None:
    begun = conversation(*USER, {"role": "assistant", "content": "The capital"})
    assert begun.continue_last and not begun.generation_prompt
    assert not conversation(*USER).continue_last


@pytest.mark.parametrize(
    ("asked", "thinking"),
    [
        ({}, Thinking(enabled=False, told=False)),
        ({"thinking": {"type": "disabled"}}, Thinking(enabled=False, told=False)),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, Thinking(enabled=True, max_tokens=2048)),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, Thinking(effort="high")),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, Thinking(told=False)),
    ],
)
def test_thinking_is_asked_for_as_anthropic_has_it(asked: dict[str, Any], thinking: Thinking) -> None:
    assert parsed(**asked).body.conversation().thinking == thinking


@pytest.mark.parametrize(
    ("asked", "choice"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "tool", "name": "get_weather"}, ToolChoice("required", ("get_weather",))),
    ],
)
def test_tool_choices_are_read(asked: dict[str, Any], choice: ToolChoice) -> None:
    body = parsed(tools=[TOOL], tool_choice={**asked, "disable_parallel_tool_use": True}).body
    assert body.conversation().tool_choice == choice
    assert not body.conversation().parallel_tool_calls


def test_what_this_server_cannot_do_for_others_is_ignored_and_named() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    done = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
    history = [*USER, {"role": "assistant", "content": [done, {"type": "text", "text": "Found."}]}, *USER]
    read = parsed(tools=[TOOL, search], messages=history, mcp_servers=[], container="c", context_management={})
    assert [tool.name for tool in read.body.tools] == ["get_weather"]
    assert {"tools[1] (web_search_20250305)", "mcp_servers", "container"} <= set(read.ignored)
    assert read.body.conversation().messages[1]["content"] == "Found."


@pytest.mark.parametrize("kind", ["text", "content"])
def test_documents_that_are_text_are_read(kind: str) -> None:
    source = {"type": kind, "data": "Once.", "content": [{"type": "text", "text": "Once."}]}
    block = {"type": "document", "title": "Tale", "source": source, "cache_control": {"type": "ephemeral"}}
    assert conversation({"role": "user", "content": [block]}).messages[0]["content"] == "Tale\nOnce."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "'max_tokens' is required"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type: this model"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].source: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: must be"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: a tool is required"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: "),
        ({"tools": [TOOL, TOOL]}, "tools: two tools have the name"),
        ({"tools": [{**TOOL, "input_schema": 3}]}, "tools[0].input_schema: "),
    ],
)
async def test_errors_have_anthropics_form(client: httpx.AsyncClient, fields: dict[str, Any], message: str) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens")[: 1 if "max_tokens" in fields else 2]:
        answer = await client.post(path, json={**BODY, **fields})
        body = answer.json()
        assert (answer.status_code, body["type"]) == (400, "error")
        assert body["error"]["type"] == "invalid_request_error" and body["error"]["message"].startswith(message)
        assert answer.headers["request-id"].startswith("req_")


@pytest.mark.parametrize("header", [{"x-api-key": "sk-a"}, {"authorization": "Bearer sk-a"}])
async def test_a_key_comes_in_either_header(engine: FakeEngine, header: dict[str, str]) -> None:
    client = in_process(engine, keys=AccessKeys(api=("sk-a",)))
    refused = await client.post("/v1/messages", json=BODY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert (await client.post("/v1/messages", json=BODY, headers=header)).status_code == 200


async def test_a_failure_in_a_stream_is_an_error_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.error_after = 2
    found = await events(client)
    assert found[-1] == {"type": "error", "error": {"type": "api_error", "message": "the model broke"}}
    assert "message_stop" not in [event["type"] for event in found]


async def test_models_are_listed_in_anthropics_form_for_its_clients(client: httpx.AsyncClient) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    listed = (await client.get("/v1/models", headers=headers)).json()
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("fake/model", "fake/model", False)
    assert listed["data"][0]["type"] == "model" and listed["data"][0]["created_at"].endswith("Z")
    one = await client.get("/v1/models/claude-opus-4", headers=headers)
    assert one.json()["id"] == "claude-opus-4"
    assert (await client.get("/v1/models/x", headers=headers)).json()["error"]["type"] == "not_found_error"
    assert (await client.get("/v1/models")).json()["object"] == "list"


async def test_the_root_says_what_this_is(engine: FakeEngine) -> None:
    client = in_process(engine, keys=AccessKeys(api=("sk-a",)))
    head = await client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert (await client.get("/")).text.startswith("vecinfer ")
    links = (await client.get("/", headers={"accept": "application/json"})).json()["links"]
    assert {"/v1/models", "/readyz", "/openapi.json"} <= set(links.values())
