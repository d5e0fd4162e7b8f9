"""PyPI ag2: a conversable agent with a tool."""

from ag2 import Agent
from ag2.config import OpenAIConfig
from harness import CAPITAL, KEY, MODEL, PLAIN, WEATHER, check, get_weather, run


def agent(**fields):
    config = OpenAIConfig(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY)
    return Agent("helper", config=config, **fields)


@check
async def chat():
    assert "Paris" in (await agent().ask(CAPITAL)).body


@check
async def tools():
    assert "18 degrees" in (await agent(tools=[get_weather]).ask(WEATHER)).body


run()
