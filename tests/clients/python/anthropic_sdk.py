"""PyPI anthropic: the Messages API."""

import json

import anthropic
from anthropic import Anthropic
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, WEATHERS, check, run

client = Anthropic(base_url=PLAIN, api_key=KEY, max_retries=0)
thinker = Anthropic(base_url=THINKING, api_key=KEY, max_retries=0)
SENTENCE = "The capital of France is Paris."
TOOL = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def ask(text, using=client, **fields):
    fields = {"max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}
    return using.messages.create(model=MODEL, **fields)


def blocks(message, kind):
    return [block for block in message.content if block.type == kind]


@check
def text():
    answer = ask(CAPITAL)
    assert [b.text for b in answer.content] == [SENTENCE]
    assert (answer.stop_reason, answer.role, answer.type) == ("end_turn", "assistant", "message")
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 0


@check
def system_and_blocks():
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    content = [{"type": "text", "text": CAPITAL, "cache_control": {"type": "ephemeral"}}]
    answer = ask("", system=system, messages=[{"role": "user", "content": content}])
    assert answer.content[0].text == SENTENCE


@check
def stream():
    with client.messages.stream(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": CAPITAL}]) as events:
        assert "".join(events.text_stream) == SENTENCE
        final = events.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0


@check
def raw_stream_events():
    kinds = [e.type for e in ask(CAPITAL, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert "content_block_start" in kinds
    assert "content_block_stop" in kinds


@check
def max_tokens():
    assert ask("count to 50", max_tokens=5).stop_reason == "max_tokens"


@check
def stop_sequences():
    answer = ask("count to 20", stop_sequences=["7"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "7")
    assert answer.content[0].text.rstrip() == "1 2 3 4 5 6"


@check
def sampling_fields():
    # Fields of the API that this version of the client no longer names.
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}
    answer = ask(CAPITAL, extra_body=sampling, metadata={"user_id": "someone"}, service_tier="auto")
    assert answer.content[0].text == SENTENCE


@check
def tools():
    answer = ask(WEATHER, tools=[TOOL])
    (call,) = blocks(answer, "tool_use")
    assert (call.name, call.input, answer.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use")


@check
def tools_in_a_stream():
    pieces = ""
    with client.messages.stream(
        model=MODEL, max_tokens=300, messages=[{"role": "user", "content": WEATHER}], tools=[TOOL]
    ) as events:
        for event in events:
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                pieces += event.delta.partial_json
        final = events.get_final_message()
    assert json.loads(pieces) == {"city": "Paris"} == blocks(final, "tool_use")[0].input


@check
def tools_in_parallel():
    assert [b.input["city"] for b in blocks(ask(WEATHERS, tools=[TOOL]), "tool_use")] == ["Paris", "Rome"]


@check
def tools_round_trip():
    answer = ask(WEATHER, tools=[TOOL])
    call = blocks(answer, "tool_use")[0]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "18 degrees"}]}
    messages = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert ask("", messages=messages, tools=[TOOL]).content[0].text == "It is 18 degrees and sunny in Paris."


@check
def tool_choice():
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        assert blocks(ask(CAPITAL, tools=[TOOL], tool_choice=choice), "tool_use")
    assert not blocks(ask(WEATHER, tools=[TOOL], tool_choice={"type": "none"}), "tool_use")


@check
def tool_error_result():
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no such city", "is_error": True}
    messages = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert ask("", messages=messages, tools=[TOOL]).content[0].type == "text"


@check
def structured_output():
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = ask(PERSON, extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert json.loads(answer.content[0].text) == {"name": "Ada", "age": 36}


@check
def thinking():
    answer = ask(CAPITAL, thinker, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    (thought,) = blocks(answer, "thinking")
    assert "short answer" in thought.thinking
    assert blocks(answer, "text")[0].text.strip() == SENTENCE


@check
def thinking_off():
    answer = ask(CAPITAL, thinker, thinking={"type": "disabled"})
    assert not blocks(answer, "thinking")
    assert answer.content[0].text.strip() == SENTENCE


@check
def thinking_in_a_stream():
    kinds = set()
    for event in ask(CAPITAL, thinker, stream=True, max_tokens=2000, thinking={"type": "adaptive"}):
        if event.type == "content_block_delta":
            kinds.add(event.delta.type)
    assert {"thinking_delta", "text_delta"} <= kinds, kinds


@check
def thinking_and_tools_round_trip():
    fields = {"tools": [TOOL], "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    answer = ask(WEATHER, thinker, **fields)
    call = blocks(answer, "tool_use")[0]
    messages = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}]},
    ]
    answer = ask("", thinker, messages=messages, **fields)
    assert blocks(answer, "text")[0].text.strip() == "It is 18 degrees and sunny in Paris."


@check
def count_tokens():
    counted = client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": CAPITAL}])
    assert counted.input_tokens == ask(CAPITAL).usage.input_tokens


@check
def system_message_in_the_middle():
    messages = [{"role": "user", "content": CAPITAL}, {"role": "system", "content": "Available agents: none."}]
    assert ask("", messages=messages).content[0].text == SENTENCE


@check
def claude_code_fields():
    answer = client.beta.messages.create(
        model=MODEL,
        max_tokens=32000,
        timeout=60,  # without one the client refuses so many tokens unless they are streamed
        messages=[{"role": "user", "content": CAPITAL}],
        betas=["interleaved-thinking-2025-05-14"],
        extra_body={
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
        },
    )
    assert answer.content[-1].text == SENTENCE


@check
def models():
    assert MODEL in [m.id for m in client.models.list().data]


@check
def errors():
    try:
        ask(CAPITAL, max_tokens=-5)
    except anthropic.BadRequestError as error:
        assert error.body["type"] == "error"
        assert error.body["error"]["type"] == "invalid_request_error"
    else:
        raise AssertionError("taken")


run()
