"""PyPI openai: the Responses API."""

import json

import openai
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, check, run
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
thinker = OpenAI(base_url=f"{THINKING}/v1", api_key=KEY, max_retries=0)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": PARAMETERS, "strict": False}
SENTENCE = "The capital of France is Paris."


class Person(BaseModel):
    name: str
    age: int


@check
def text():
    answer = client.responses.create(model=MODEL, input=CAPITAL)
    assert answer.output_text == SENTENCE
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@check
def instructions_and_messages():
    items = [{"role": "user", "content": [{"type": "input_text", "text": CAPITAL}]}]
    answer = client.responses.create(model=MODEL, instructions="Be brief.", input=items, max_output_tokens=100)
    assert answer.output_text == SENTENCE


@check
def cut_by_length():
    answer = client.responses.create(model=MODEL, input="count to 50", max_output_tokens=16)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


@check
def stream():
    kinds, said, final = [], "", None
    for event in client.responses.create(model=MODEL, input=CAPITAL, stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            said += event.delta
        if event.type == "response.completed":
            final = event.response
    assert said == SENTENCE == final.output_text
    assert kinds[0] == "response.created"
    for kind in ("in_progress", "output_item.added", "content_part.added", "output_text.done", "output_item.done"):
        assert f"response.{kind}" in kinds, kind


@check
def stream_helper():
    with client.responses.stream(model=MODEL, input=CAPITAL) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_text == SENTENCE


@check
def tools():
    answer = client.responses.create(model=MODEL, input=WEATHER, tools=[TOOL])
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


@check
def tools_in_a_stream():
    arguments, done = "", None
    for event in client.responses.create(model=MODEL, input=WEATHER, tools=[TOOL], stream=True):
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        if event.type == "response.function_call_arguments.done":
            done = event.arguments
    assert json.loads(arguments) == json.loads(done) == {"city": "Paris"}


@check
def tools_round_trip():
    items = [{"role": "user", "content": WEATHER}]
    answer = client.responses.create(model=MODEL, input=items, tools=[TOOL])
    items += answer.output
    call = next(item for item in answer.output if item.type == "function_call")
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"})
    answer = client.responses.create(model=MODEL, input=items, tools=[TOOL])
    assert answer.output_text == "It is 18 degrees and sunny in Paris."


@check
def tool_choice():
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        answer = client.responses.create(model=MODEL, input=CAPITAL, tools=[TOOL], tool_choice=choice)
        assert [i for i in answer.output if i.type == "function_call"]
    answer = client.responses.create(model=MODEL, input=WEATHER, tools=[TOOL], tool_choice="none")
    assert not [i for i in answer.output if i.type == "function_call"]


@check
def json_schema():
    answer = client.responses.parse(model=MODEL, input=PERSON, text_format=Person)
    assert answer.output_parsed == Person(name="Ada", age=36)


@check
def json_object():
    answer = client.responses.create(model=MODEL, input=PERSON, text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(answer.output_text), dict)


@check
def reasoning():
    answer = thinker.responses.create(model=MODEL, input=CAPITAL, reasoning={"effort": "low", "summary": "auto"})
    (thought,) = [item for item in answer.output if item.type == "reasoning"]
    told = [part.text for part in (thought.content or []) + (thought.summary or [])]
    assert any("short answer" in text for text in told)
    assert answer.output_text.strip() == SENTENCE
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


@check
def reasoning_in_a_stream():
    kinds = {e.type for e in thinker.responses.create(model=MODEL, input=CAPITAL, stream=True)}
    assert kinds & {"response.reasoning_text.delta", "response.reasoning_summary_text.delta"}, kinds


@check
def reasoning_and_tools_round_trip():
    items = [{"role": "user", "content": WEATHER}]
    answer = thinker.responses.create(
        model=MODEL, input=items, tools=[TOOL], store=False, include=["reasoning.encrypted_content"]
    )
    items += answer.output
    call = next(item for item in answer.output if item.type == "function_call")
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"})
    answer = thinker.responses.create(model=MODEL, input=items, tools=[TOOL], store=False)
    assert answer.output_text.strip() == "It is 18 degrees and sunny in Paris."


@check
def store_and_go_on():
    first = client.responses.create(model=MODEL, input="Hello", store=True)
    second = client.responses.create(model=MODEL, input=CAPITAL, previous_response_id=first.id)
    assert second.output_text == SENTENCE
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + 5


@check
def retrieve_and_delete():
    made = client.responses.create(model=MODEL, input=CAPITAL, store=True)
    assert client.responses.retrieve(made.id).output_text == SENTENCE
    assert client.responses.input_items.list(made.id).data
    client.responses.delete(made.id)
    try:
        client.responses.retrieve(made.id)
    except openai.NotFoundError:
        return
    raise AssertionError("still there")


@check
def fields_of_codex():
    answer = client.responses.create(
        model=MODEL,
        input=[
            {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}
            for role, text in (("developer", "Be brief."), ("user", CAPITAL))
        ],
        tools=[TOOL, {"type": "web_search"}],
        parallel_tool_calls=True,
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="key",
        metadata={"a": "b"},
        truncation="auto",
        text={"verbosity": "low"},
        extra_body={"client_metadata": {"a": "b"}},
    )
    assert answer.output_text == SENTENCE, answer.model_dump_json()


@check
def errors():
    for fields in ({"input": CAPITAL, "model": "no such model"}, {"input": CAPITAL, "temperature": "hot"}):
        try:
            client.responses.create(**{"model": MODEL, **fields})
        except (openai.BadRequestError, openai.NotFoundError) as error:
            assert error.body["message"]
        else:
            raise AssertionError(f"taken: {fields}")


run()
