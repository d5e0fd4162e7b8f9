"""PyPI chatlas: chat, tools and extraction over chat completions, Responses and Messages."""

from chatlas import ChatAnthropic, ChatOpenAI, ChatOpenAICompletions
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def completions():
    return ChatOpenAICompletions(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY)


def talk(chat):
    assert "Paris" in str(chat.chat(CAPITAL, echo="none"))


def use_tool(chat):
    chat.register_tool(get_weather)
    assert "18 degrees" in str(chat.chat(WEATHER, echo="none"))


@check
def chat_completions():
    talk(completions())


@check
def chat_completions_stream():
    assert "Paris" in "".join(map(str, completions().stream(CAPITAL, echo="none")))


@check
def chat_completions_tools():
    use_tool(completions())


@check
def chat_completions_structured():
    assert completions().chat_structured(PERSON, data_model=Person) == Person(name="Ada", age=36)


@check
def responses():
    talk(ChatOpenAI(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY))


@check
def responses_tools():
    use_tool(ChatOpenAI(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY))


@check
def messages():
    talk(ChatAnthropic(model=MODEL, api_key=KEY, kwargs={"base_url": PLAIN}))


@check
def messages_tools():
    use_tool(ChatAnthropic(model=MODEL, api_key=KEY, kwargs={"base_url": PLAIN}))


run()
