"""PyPI openai: chat completions, completions, models, embeddings, errors."""

import json

import openai
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, WEATHERS, check, run
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
thinker = OpenAI(base_url=f"{THINKING}/v1", api_key=KEY, max_retries=0)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    name: str
    age: int


def ask(text, using=client, **fields):
    return using.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **fields)


def joined(stream):
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


@check
def chat():
    answer = ask(CAPITAL)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check
def stream():
    assert joined(ask(CAPITAL, stream=True)) == "The capital of France is Paris."


@check
def stream_usage():
    chunks = list(ask(CAPITAL, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].choices == []


@check
def unicode_is_whole():
    assert joined(ask("Say it in Unicode", stream=True)) == "Grüße aus 東京 🗼, naïve café."


@check
async def concurrent_streams():
    import asyncio

    asynchronous = AsyncOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)

    async def one(number):
        text = ""
        messages = [{"role": "user", "content": f"count to {number}"}]
        async for chunk in await asynchronous.chat.completions.create(model=MODEL, messages=messages, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    answers = await asyncio.gather(*(one(number) for number in range(5, 13)))
    assert answers == [" ".join(map(str, range(1, n + 1))) for n in range(5, 13)], answers


@check
def many_turns():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": CAPITAL}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert "Paris" in answer.choices[0].message.content


@check
def developer_message():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": CAPITAL}]
    assert "Paris" in client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


@check
def max_tokens_end_it():
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask("count to 50", **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5


@check
def max_tokens_beyond_the_context():
    assert "Paris" in ask(CAPITAL, max_tokens=1_000_000).choices[0].message.content


@check
def stop_words():
    answer = ask("count to 20", stop=["7", "9"])
    assert answer.choices[0].message.content.rstrip() == "1 2 3 4 5 6"


@check
def n_choices():
    answer = ask(CAPITAL, n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"The capital of France is Paris."}


@check
def logprobs():
    content = ask(CAPITAL, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(t.token for t in content).startswith("The capital of France is Paris.")
    assert all(len(t.top_logprobs) == 3 for t in content)


@check
def logit_bias():
    answer = ask("yes or no?", logit_bias={"10407": -100}, max_tokens=4)
    assert answer.choices[0].message.content is not None


@check
def sampling_fields():
    answer = ask(
        CAPITAL, temperature=0.7, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.1, seed=7, user="someone"
    )
    assert "Paris" in answer.choices[0].message.content


@check
def fields_of_newer_apis():
    answer = ask(
        CAPITAL,
        store=False,
        metadata={"purpose": "test"},
        service_tier="auto",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        reasoning_effort="low",
        prediction={"type": "content", "content": "The capital"},
        modalities=["text"],
    )
    assert "Paris" in answer.choices[0].message.content


@check
def fields_of_other_servers():
    extra = {
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.0,
        "repeat_penalty": 1.0,
        "cache_prompt": True,
        "keep_alive": "5m",
        "options": {"num_ctx": 4096},
        "add_generation_prompt": True,
        "skip_special_tokens": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "never_heard_of": 1,
    }
    assert "Paris" in ask(CAPITAL, extra_body=extra).choices[0].message.content


@check
def tools():
    answer = ask(WEATHER, tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert not answer.choices[0].message.content


@check
def tools_with_text_before():
    message = ask("first say you look. " + WEATHER, tools=[TOOL]).choices[0].message
    assert message.content.strip() == "Let me look."
    assert message.tool_calls[0].function.name == "get_weather"


@check
def tools_in_a_stream():
    name, arguments, ids, finish = "", "", set(), None
    for chunk in ask(WEATHER, tools=[TOOL], stream=True):
        for choice in chunk.choices:
            assert "<tool" not in (choice.delta.content or "")
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
                ids |= {call.id} - {None}
    assert (name, json.loads(arguments), finish, len(ids)) == ("get_weather", {"city": "Paris"}, "tool_calls", 1)


@check
def tools_in_parallel():
    calls = ask(WEATHERS, tools=[TOOL], parallel_tool_calls=True).choices[0].message.tool_calls
    assert [json.loads(c.function.arguments)["city"] for c in calls] == ["Paris", "Rome"]
    assert len({c.id for c in calls}) == 2


@check
def tools_not_in_parallel():
    assert len(ask(WEATHERS, tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


@check
def tools_round_trip():
    messages = [{"role": "user", "content": WEATHER}]
    message = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18 degrees"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "It is 18 degrees and sunny in Paris."
    assert answer.choices[0].finish_reason == "stop"


@check
def tool_choice_none():
    answer = ask(WEATHER, tools=[TOOL], tool_choice="none")
    assert not answer.choices[0].message.tool_calls


@check
def tool_choice_required():
    call = ask(CAPITAL, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert "city" in json.loads(call.function.arguments)


@check
def tool_choice_named():
    choice = {"type": "function", "function": {"name": "get_weather"}}
    call = ask(CAPITAL, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls[0]
    assert "city" in json.loads(call.function.arguments)


@check
def strict_tool():
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    strict["function"]["parameters"] = {**strict["function"]["parameters"], "additionalProperties": False}
    call = ask(WEATHER, tools=[strict]).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@check
def legacy_functions():
    answer = ask(WEATHER, functions=[TOOL["function"]], function_call="auto")
    assert json.loads(answer.choices[0].message.function_call.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "function_call"


@check
def stream_helper_with_tools():
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": WEATHER}], tools=[TOOL]
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"


@check
def json_object():
    assert isinstance(json.loads(ask(PERSON, response_format={"type": "json_object"}).choices[0].message.content), dict)


@check
def json_schema():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    assert json.loads(ask(PERSON, response_format=wanted).choices[0].message.content) == {"name": "Ada", "age": 36}


@check
def json_schema_holds_an_unwilling_model():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = ask(CAPITAL, response_format=wanted, max_tokens=200).choices[0]
    found = json.loads(answer.message.content)
    assert isinstance(found["name"], str)
    assert isinstance(found["age"], int)


@check
def json_schema_in_a_stream():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    assert json.loads(joined(ask(PERSON, response_format=wanted, stream=True))) == {"name": "Ada", "age": 36}


@check
def parse_helper():
    messages = [{"role": "user", "content": PERSON}]
    answer = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)


@check
def json_schema_with_thinking():
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    message = ask(PERSON, thinker, response_format=wanted).choices[0].message
    assert json.loads(message.content) == {"name": "Ada", "age": 36}


@check
def guided_choice():
    for extra in ({"guided_choice": ["blue", "red"]}, {"structured_outputs": {"choice": ["blue", "red"]}}):
        assert ask(CAPITAL, extra_body=extra).choices[0].message.content in ("blue", "red")


@check
def guided_regex():
    content = ask(CAPITAL, extra_body={"structured_outputs": {"regex": "[a-c]{4}"}}).choices[0].message.content
    assert len(content) == 4, content


@check
def bad_schema_is_refused():
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}, "strict": True}}
    try:
        ask(CAPITAL, response_format=wanted)
    except openai.BadRequestError:
        return
    raise AssertionError("taken")


@check
def reasoning():
    answer = ask(CAPITAL, thinker)
    message = answer.choices[0].message
    assert message.content.strip() == "The capital of France is Paris."
    assert "short answer" in message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


@check
def reasoning_in_a_stream():
    thought = said = ""
    for chunk in ask(CAPITAL, thinker, stream=True):
        if chunk.choices:
            delta = chunk.choices[0].delta
            said += delta.content or ""
            thought += getattr(delta, "reasoning_content", None) or ""
    assert "short answer" in thought
    assert said.strip() == "The capital of France is Paris."


@check
def reasoning_off():
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    message = ask(CAPITAL, thinker, extra_body=extra).choices[0].message
    assert message.content.strip() == "The capital of France is Paris."
    assert not getattr(message, "reasoning_content", None)


@check
def reasoning_then_tools():
    messages = [{"role": "user", "content": WEATHER}]
    message = thinker.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
    assert "short answer" in message.reasoning_content
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18 degrees"}]
    answer = thinker.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content.strip() == "It is 18 degrees and sunny in Paris."


@check
def completions():
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=2)
    assert answer.choices[0].text == " Paris."


@check
def completions_stream():
    stream = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=2, stream=True)
    assert "".join(c.choices[0].text for c in stream if c.choices) == " Paris."


@check
def completions_list_of_prompts():
    prompts = ["The capital of France is", "The capital of Japan is"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=1)
    assert [c.text for c in answer.choices] == [" Paris", " Tokyo"]


@check
def completions_echo():
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "The capital of France is Paris"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert len(answer.choices[0].logprobs.tokens) == 6


@check
def completions_score_only():
    answer = client.completions.create(model=MODEL, prompt="The capital of France", max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "The capital of France"
    assert len(answer.choices[0].logprobs.token_logprobs) == 4


@check
def completions_best_of_and_suffix():
    answer = client.completions.create(model=MODEL, prompt="def add(a, b):\n", max_tokens=8, best_of=1, suffix="\n")
    assert answer.choices[0].text


@check
def models():
    listed = client.models.list().data
    assert MODEL in [m.id for m in listed]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def embeddings_or_a_reason():
    try:
        answer = client.embeddings.create(model=MODEL, input=["Paris", "Rome"])
    except openai.NotFoundError as error:
        assert "embedding_model" in str(error), error
        return
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 0


@check
def errors():
    for fields, wanted in (
        ({"model": "no such model"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"temperature": "hot"}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": [{"role": "user", "content": "x"}], **fields})
        except wanted as error:
            assert error.body["message"]
        else:
            raise AssertionError(f"taken: {fields}")


@check
def images_are_refused():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    try:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [part]}])
    except openai.BadRequestError as error:
        assert "image" in str(error)
    else:
        raise AssertionError("taken")


@check
def request_id():
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert raw.headers.get("x-request-id")
    assert raw.parse()._request_id == raw.headers["x-request-id"]


@check
def base_url_without_v1():
    bare = OpenAI(base_url=PLAIN, api_key=KEY, max_retries=0)
    assert "Paris" in ask(CAPITAL, bare).choices[0].message.content


run()
