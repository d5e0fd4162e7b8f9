"""PyPI strands-agents: an agent with a tool, and structured output."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, run
from pydantic import BaseModel
from strands import Agent, tool
from strands.models.openai import OpenAIModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"18 degrees in {city}"


def agent(**fields):
    model = OpenAIModel(client_args={"base_url": f"{PLAIN}/v1", "api_key": KEY}, model_id=MODEL)
    return Agent(model=model, callback_handler=None, **fields)


@check
def chat():
    assert "Paris" in str(agent()(CAPITAL))


@check
def tools():
    assert "18 degrees" in str(agent(tools=[get_weather])(WEATHER))


@check
def structured():
    assert agent()(PERSON, structured_output_model=Person).structured_output == Person(name="Ada", age=36)


run()
