"""PyPI magentic: functions whose bodies are prompts."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from magentic import FunctionCall, StreamedStr, prompt
from magentic.chat_model.openai_chat_model import OpenaiChatModel
from pydantic import BaseModel

model = OpenaiChatModel(MODEL, base_url=f"{PLAIN}/v1", api_key=KEY)


class Person(BaseModel):
    name: str
    age: int


@check
def chat():
    @prompt(CAPITAL, model=model)
    def ask() -> str: ...

    assert "Paris" in ask()


@check
def stream():
    @prompt(CAPITAL, model=model)
    def ask() -> StreamedStr: ...

    assert "Paris" in "".join(ask())


@check
def tools():
    @prompt(WEATHER, functions=[get_weather], model=model)
    def ask() -> FunctionCall[str]: ...

    assert "18 degrees" in ask()()


@check
def object_output():
    @prompt(PERSON, model=model)
    def ask() -> Person: ...

    assert ask() == Person(name="Ada", age=36)


run()
