"""PyPI litellm: chat completions, completions, Responses and Messages."""

import json

import litellm
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, check, run
from pydantic import BaseModel

litellm.suppress_debug_info = True
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}]
FIELDS = {"api_base": f"{PLAIN}/v1", "api_key": KEY, "num_retries": 0}


class Person(BaseModel):
    name: str
    age: int


def ask(text, **fields):
    messages = [{"role": "user", "content": text}]
    return litellm.completion(**{"model": f"openai/{MODEL}", "messages": messages, **FIELDS, **fields})


@check
def chat():
    assert "Paris" in ask(CAPITAL).choices[0].message.content


@check
def stream():
    pieces = ask(CAPITAL, stream=True, stream_options={"include_usage": True})
    assert "Paris" in "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)


@check
def other_providers():
    for provider in ("hosted_vllm", "lm_studio", "custom_openai"):
        assert "Paris" in ask(CAPITAL, model=f"{provider}/{MODEL}").choices[0].message.content, provider


@check
def tools():
    call = ask(WEATHER, tools=TOOLS).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@check
def tools_in_a_stream():
    whole = litellm.stream_chunk_builder(list(ask(WEATHER, tools=TOOLS, stream=True)))
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}


@check
def json_schema():
    content = ask(PERSON, response_format=Person).choices[0].message.content
    assert Person.model_validate_json(content) == Person(name="Ada", age=36)


@check
def reasoning():
    message = ask(CAPITAL, api_base=f"{THINKING}/v1").choices[0].message
    assert "short answer" in message.reasoning_content


@check
def text_completion():
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="The capital of France is", max_tokens=2, **FIELDS
    )
    assert answer.choices[0].text == " Paris."


@check
def responses():
    answer = litellm.responses(model=f"openai/{MODEL}", input=CAPITAL, **FIELDS)
    assert "Paris" in answer.output[-1].content[0].text


@check
def messages():
    answer = ask(CAPITAL, model=f"anthropic/{MODEL}", api_base=PLAIN, max_tokens=100)
    assert "Paris" in answer.choices[0].message.content


@check
def messages_tools():
    answer = ask(WEATHER, model=f"anthropic/{MODEL}", api_base=PLAIN, max_tokens=300, tools=TOOLS)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"city": "Paris"}


run()
