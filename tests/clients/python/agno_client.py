"""PyPI agno: agents over its OpenAI-like, Responses and Anthropic models."""

from agno.agent import Agent
from agno.models.openai import OpenAIResponses
from agno.models.openai.like import OpenAILike
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def model(kind=OpenAILike):
    return kind(id=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY)


@check
def chat():
    assert "Paris" in Agent(model=model()).run(CAPITAL).content


@check
def stream():
    pieces = [e.content for e in Agent(model=model()).run(CAPITAL, stream=True) if isinstance(e.content, str)]
    assert "Paris" in "".join(pieces)


@check
def tools():
    assert "18 degrees" in Agent(model=model(), tools=[get_weather]).run(WEATHER).content


@check
def output_schema():
    assert Agent(model=model(), output_schema=Person).run(PERSON).content == Person(name="Ada", age=36)


@check
def responses():
    assert "Paris" in Agent(model=model(OpenAIResponses)).run(CAPITAL).content


@check
def responses_tools():
    assert "18 degrees" in Agent(model=model(OpenAIResponses), tools=[get_weather]).run(WEATHER).content


run()
