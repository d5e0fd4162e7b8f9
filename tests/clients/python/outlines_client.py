"""PyPI outlines: structured output from an OpenAI-compatible server, and vLLM's fields."""

from typing import Literal

import openai
import outlines
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, check, run
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)


class Person(BaseModel):
    name: str
    age: int


@check
def chat():
    assert "Paris" in outlines.from_openai(client, MODEL)(CAPITAL)


@check
def stream():
    assert "Paris" in "".join(outlines.from_openai(client, MODEL).stream(CAPITAL))


@check
def json_schema():
    answer = outlines.from_openai(client, MODEL)(PERSON, Person)
    assert Person.model_validate_json(answer) == Person(name="Ada", age=36)


@check
def vllm_json_schema():
    answer = outlines.from_vllm(client, MODEL)(PERSON, Person)
    assert Person.model_validate_json(answer) == Person(name="Ada", age=36)


@check
def vllm_choice():
    assert outlines.from_vllm(client, MODEL)(CAPITAL, Literal["blue", "red"]) in ("blue", "red")


run()
