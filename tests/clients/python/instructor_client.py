"""PyPI instructor: every mode that a local server can serve."""

import instructor
from anthropic import Anthropic
from harness import KEY, MODEL, PERSON, PLAIN, check, run
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def extract(mode, **fields):
    openai = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
    client = instructor.from_openai(openai, mode=mode)
    messages = [{"role": "user", "content": PERSON}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, response_model=Person, max_retries=0, **fields
    )


ADA = {"name": "Ada", "age": 36}


@check
def tools():
    assert extract(instructor.Mode.TOOLS).model_dump() == ADA


@check
def tools_strict():
    assert extract(instructor.Mode.TOOLS_STRICT).model_dump() == ADA


@check
def json_mode():
    assert extract(instructor.Mode.JSON).model_dump() == ADA


@check
def json_schema():
    assert extract(instructor.Mode.JSON_SCHEMA).model_dump() == ADA


@check
def markdown_json():
    assert extract(instructor.Mode.MD_JSON).model_dump() == ADA


@check
def partial_stream():
    openai = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
    client = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
    messages = [{"role": "user", "content": PERSON}]
    *_, last = client.chat.completions.create_partial(model=MODEL, messages=messages, response_model=Person)
    assert (last.name, last.age) == ("Ada", 36)


@check
def anthropic_tools():
    client = instructor.from_anthropic(Anthropic(base_url=PLAIN, api_key=KEY, max_retries=0))
    messages = [{"role": "user", "content": PERSON}]
    answer = client.messages.create(
        model=MODEL, max_tokens=300, messages=messages, response_model=Person, max_retries=0
    )
    assert answer.model_dump() == ADA


run()
