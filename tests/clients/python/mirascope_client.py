"""PyPI mirascope: calls, streams, tools and formats."""

import os

from harness import CAPITAL, MODEL, PERSON, PLAIN, WEATHER, check, run
from mirascope import llm
from pydantic import BaseModel

os.environ["OPENAI_API_KEY"] = "local"
llm.register_provider("openai:completions", scope="openai/", base_url=f"{PLAIN}/v1", api_key="local")
NAME = f"openai/{MODEL}"


class Person(BaseModel):
    name: str
    age: int


@llm.tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"18 degrees in {city}"


@check
def chat():
    assert "Paris" in llm.Model(NAME).call(CAPITAL).text()


@check
def stream():
    assert "Paris" in "".join(llm.Model(NAME).stream(CAPITAL).text_stream())


@check
def tools():
    response = llm.Model(NAME).call(WEATHER, tools=[get_weather])
    answer = response.resume(response.execute_tools())
    assert "18 degrees" in answer.text()


@check
def formats():
    for mode in ("strict", "tool", "json"):
        answer = llm.Model(NAME).call(PERSON, format=llm.format(Person, mode=mode))
        assert answer.parse() == Person(name="Ada", age=36), mode


run()
