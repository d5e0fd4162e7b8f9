"""PyPI openai against the demo model with its packed cache: a model that says what it likes."""

import json

from harness import CAPITAL, DEMO, KEY, MODEL, check, run
from openai import OpenAI

client = OpenAI(base_url=f"{DEMO}/v1", api_key=KEY, max_retries=0)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(text, **fields):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)


@check
def chat():
    assert ask(CAPITAL, max_tokens=24).choices[0].message.content.strip()


@check
def stream_is_the_same_text():
    whole = ask(CAPITAL, max_tokens=24).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in ask(CAPITAL, max_tokens=24, stream=True) if c.choices]
    assert "".join(pieces) == whole


@check
def json_schema():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    choice = ask("Invent a person, as JSON.", response_format=wanted, max_tokens=128).choices[0]
    assert choice.finish_reason == "stop"
    assert set(json.loads(choice.message.content)) == {"name", "age"}


@check
def required_tool():
    function = {"name": "invent", "description": "Invent a person.", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    answer = ask("Invent a person.", tools=tools, tool_choice="required", parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1
    call = answer.choices[0].message.tool_calls[0].function
    assert (call.name, set(json.loads(call.arguments))) == ("invent", {"name", "age"})


@check
def completions_score():
    answer = client.completions.create(model=MODEL, prompt="Two and two is", max_tokens=0, echo=True, logprobs=1)
    scores = answer.choices[0].logprobs.token_logprobs
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])


run()
