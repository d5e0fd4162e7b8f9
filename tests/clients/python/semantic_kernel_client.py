"""PyPI semantic-kernel: chat, streaming and automatic function calls."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, run
from openai import AsyncOpenAI
from pydantic import BaseModel
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function


class Person(BaseModel):
    name: str
    age: int


class Weather:
    @kernel_function(name="get_weather", description="The weather in a city.")
    def get_weather(self, city: str) -> str:
        return f"18 degrees in {city}"


def service():
    client = AsyncOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, max_retries=0)
    return OpenAIChatCompletion(ai_model_id=MODEL, async_client=client)


def history(text):
    chat = ChatHistory()
    chat.add_user_message(text)
    return chat


@check
async def chat():
    answer = await service().get_chat_message_content(history(CAPITAL), OpenAIChatPromptExecutionSettings())
    assert "Paris" in str(answer)


@check
async def stream():
    said = ""
    async for piece in service().get_streaming_chat_message_content(
        history(CAPITAL), OpenAIChatPromptExecutionSettings()
    ):
        said += str(piece)
    assert "Paris" in said


@check
async def tools():
    kernel = Kernel()
    kernel.add_plugin(Weather(), plugin_name="weather")
    settings = OpenAIChatPromptExecutionSettings(function_choice_behavior=FunctionChoiceBehavior.Auto())
    answer = await service().get_chat_message_content(history(WEATHER), settings, kernel=kernel)
    assert "18 degrees" in str(answer)


@check
async def json_schema():
    settings = OpenAIChatPromptExecutionSettings(response_format=Person)
    answer = await service().get_chat_message_content(history(PERSON), settings)
    assert Person.model_validate_json(str(answer)) == Person(name="Ada", age=36)


run()
