"""PyPI autogen-agentchat with the OpenAI client of autogen-ext."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from pydantic import BaseModel

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}


class Person(BaseModel):
    name: str
    age: int


def client():
    return OpenAIChatCompletionClient(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY, model_info=INFO, max_retries=0)


async def weather(city: str) -> str:
    """The weather in a city."""
    await asyncio.sleep(0)
    return get_weather(city)


@check
async def chat():
    answer = await client().create([UserMessage(content=CAPITAL, source="user")])
    assert "Paris" in answer.content


@check
async def stream():
    last = None
    async for piece in client().create_stream([UserMessage(content=CAPITAL, source="user")]):
        last = piece
    assert "Paris" in last.content


@check
async def tools():
    agent = AssistantAgent("helper", model_client=client(), tools=[weather], reflect_on_tool_use=True)
    result = await agent.run(task=WEATHER)
    assert "18 degrees" in result.messages[-1].content


@check
async def json_output():
    answer = await client().create([UserMessage(content=PERSON, source="user")], json_output=Person)
    assert Person.model_validate_json(answer.content) == Person(name="Ada", age=36)


run()
