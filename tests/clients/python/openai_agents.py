"""PyPI openai-agents, over chat completions and over Responses (its default)."""

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from openai import AsyncOpenAI
from pydantic import BaseModel

tool = function_tool(get_weather)


def model(kind=OpenAIChatCompletionsModel):
    return kind(model=MODEL, openai_client=AsyncOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0))


class Person(BaseModel):
    name: str
    age: int


async def final(kind, prompt, **fields):
    agent = Agent(name="helper", instructions="Be brief.", model=model(kind), **fields)
    return (await Runner.run(agent, prompt)).final_output


async def streamed(kind, prompt, **fields):
    agent = Agent(name="helper", instructions="Be brief.", model=model(kind), **fields)
    result = Runner.run_streamed(agent, prompt)
    async for _ in result.stream_events():
        pass
    return result.final_output


@check
async def chat():
    assert "Paris" in await final(OpenAIChatCompletionsModel, CAPITAL)


@check
async def chat_stream():
    assert "Paris" in await streamed(OpenAIChatCompletionsModel, CAPITAL)


@check
async def chat_tools():
    assert "18 degrees" in await final(OpenAIChatCompletionsModel, WEATHER, tools=[tool])


@check
async def chat_tools_stream():
    assert "18 degrees" in await streamed(OpenAIChatCompletionsModel, WEATHER, tools=[tool])


@check
async def chat_required_tool():
    settings = ModelSettings(tool_choice="required")
    answer = await final(OpenAIChatCompletionsModel, WEATHER, tools=[tool], model_settings=settings)
    assert "18 degrees" in answer


@check
async def chat_output_type():
    assert await final(OpenAIChatCompletionsModel, PERSON, output_type=Person) == Person(name="Ada", age=36)


@check
async def responses():
    assert "Paris" in await final(OpenAIResponsesModel, CAPITAL)


@check
async def responses_stream():
    assert "Paris" in await streamed(OpenAIResponsesModel, CAPITAL)


@check
async def responses_tools():
    assert "18 degrees" in await final(OpenAIResponsesModel, WEATHER, tools=[tool])


@check
async def responses_tools_stream():
    assert "18 degrees" in await streamed(OpenAIResponsesModel, WEATHER, tools=[tool])


@check
async def responses_output_type():
    assert await final(OpenAIResponsesModel, PERSON, output_type=Person) == Person(name="Ada", age=36)


run()
