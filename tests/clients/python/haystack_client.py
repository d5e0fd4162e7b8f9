"""PyPI haystack-ai: its OpenAI generators, tools and agent."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def generator(kind=OpenAIChatGenerator, **fields):
    return kind(model=MODEL, api_base_url=f"{PLAIN}/v1", api_key=Secret.from_token(KEY), max_retries=0, **fields)


def ask(text, **fields):
    return generator(**fields).run([ChatMessage.from_user(text)])["replies"][0]


@check
def chat():
    assert "Paris" in ask(CAPITAL).text


@check
def stream():
    pieces = []
    assert "Paris" in ask(CAPITAL, streaming_callback=lambda chunk: pieces.append(chunk.content)).text
    assert "Paris" in "".join(pieces)


@check
def tools():
    tool = create_tool_from_function(get_weather)
    assert ask(WEATHER, tools=[tool]).tool_calls[0].arguments == {"city": "Paris"}


@check
def agent():
    agent = Agent(chat_generator=generator(), tools=[create_tool_from_function(get_weather)])
    assert "18 degrees" in agent.run([ChatMessage.from_user(WEATHER)])["messages"][-1].text


@check
def json_schema():
    answer = ask(PERSON, generation_kwargs={"response_format": Person})
    assert Person.model_validate_json(answer.text) == Person(name="Ada", age=36)


@check
def responses():
    reply = generator(OpenAIResponsesChatGenerator).run([ChatMessage.from_user(CAPITAL)])["replies"][0]
    assert "Paris" in reply.text


run()
