"""PyPI pydantic-ai: its OpenAI chat, Responses and Anthropic models."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, check, get_weather, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

chat_model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{PLAIN}/v1", api_key=KEY))
thinking_model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{THINKING}/v1", api_key=KEY))


def responses_model():
    return OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=f"{PLAIN}/v1", api_key=KEY))


def claude_model():
    return AnthropicModel(MODEL, provider=AnthropicProvider(base_url=PLAIN, api_key=KEY))


class Person(BaseModel):
    name: str
    age: int


ADA = Person(name="Ada", age=36)


@check
def chat():
    assert "Paris" in Agent(chat_model, system_prompt="Be brief.").run_sync(CAPITAL).output


@check
async def stream():
    async with Agent(chat_model).run_stream(CAPITAL) as result:
        assert "Paris" in await result.get_output()


@check
def tools():
    assert "18 degrees" in Agent(chat_model, tools=[get_weather]).run_sync(WEATHER).output


@check
async def tools_in_a_stream():
    async with Agent(chat_model, tools=[get_weather]).run_stream(WEATHER) as result:
        assert "18 degrees" in await result.get_output()


@check
def output_by_tool():
    assert Agent(chat_model, output_type=ToolOutput(Person)).run_sync(PERSON).output == ADA


@check
def output_by_schema():
    assert Agent(chat_model, output_type=NativeOutput(Person)).run_sync(PERSON).output == ADA


@check
def output_by_prompt():
    assert Agent(chat_model, output_type=PromptedOutput(Person)).run_sync(PERSON).output == ADA


@check
def thinking():
    result = Agent(thinking_model).run_sync(CAPITAL)
    kinds = [part.part_kind for part in result.all_messages()[-1].parts]
    assert "thinking" in kinds, kinds
    assert "Paris" in result.output


@check
def thinking_and_tools():
    assert "18 degrees" in Agent(thinking_model, tools=[get_weather]).run_sync(WEATHER).output


@check
def responses_api():
    assert "Paris" in Agent(responses_model()).run_sync(CAPITAL).output


@check
def responses_api_tools():
    assert "18 degrees" in Agent(responses_model(), tools=[get_weather]).run_sync(WEATHER).output


@check
def responses_api_output():
    assert Agent(responses_model(), output_type=NativeOutput(Person)).run_sync(PERSON).output == ADA


@check
def messages_api():
    assert "Paris" in Agent(claude_model()).run_sync(CAPITAL).output


@check
def messages_api_tools():
    assert "18 degrees" in Agent(claude_model(), tools=[get_weather]).run_sync(WEATHER).output


@check
def messages_api_output():
    assert Agent(claude_model(), output_type=ToolOutput(Person)).run_sync(PERSON).output == ADA


run()
