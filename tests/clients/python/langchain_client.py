"""PyPI langchain-openai (chat and Responses), langchain-anthropic and langgraph."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, check, get_weather, run
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.prebuilt import create_react_agent
from pydantic import BaseModel

chat = ChatOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, model=MODEL, max_retries=0, stream_usage=True)
responses = ChatOpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, model=MODEL, max_retries=0, use_responses_api=True)
claude = ChatAnthropic(base_url=PLAIN, api_key=KEY, model=MODEL, max_retries=0, max_tokens=500)
thinker = ChatAnthropic(
    base_url=THINKING, api_key=KEY, model=MODEL, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024}
)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


ADA = Person(name="Ada", age=36)


def text(model):
    assert "Paris" in model.invoke(CAPITAL).text


def stream(model):
    assert "".join(c.text for c in model.stream(CAPITAL)) == "The capital of France is Paris."


def tools(model):
    assert model.bind_tools([get_weather]).invoke(WEATHER).tool_calls[0]["args"] == {"city": "Paris"}


def tool_stream(model):
    whole = None
    for chunk in model.bind_tools([get_weather]).stream(WEATHER):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Paris"}


def agent(model):
    result = create_react_agent(model, [get_weather]).invoke({"messages": [("user", WEATHER)]})
    assert "18 degrees" in result["messages"][-1].text


@check
def chat_text():
    text(chat)


@check
def chat_stream():
    stream(chat)


@check
def chat_tools():
    tools(chat)


@check
def chat_tool_stream():
    tool_stream(chat)


@check
def chat_agent():
    agent(chat)


@check
def chat_forced_tool():
    answer = chat.bind_tools([get_weather], tool_choice="get_weather").invoke(CAPITAL)
    assert answer.tool_calls[0]["name"] == "get_weather"


@check
def chat_structured():
    for method in ("json_schema", "function_calling", "json_mode"):
        assert chat.with_structured_output(Person, method=method).invoke(PERSON) == ADA, method


@check
def chat_logprobs():
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(CAPITAL)
    assert answer.response_metadata["logprobs"]["content"]


@check
def completions():
    llm = OpenAI(base_url=f"{PLAIN}/v1", api_key=KEY, model=MODEL, max_tokens=2)
    assert llm.invoke("The capital of France is") == " Paris."


@check
def responses_text():
    text(responses)


@check
def responses_stream():
    stream(responses)


@check
def responses_agent():
    agent(responses)


@check
def responses_structured():
    assert responses.with_structured_output(Person).invoke(PERSON) == ADA


@check
def messages_text():
    text(claude)


@check
def messages_stream():
    stream(claude)


@check
def messages_tools():
    tools(claude)


@check
def messages_agent():
    agent(claude)


@check
def messages_structured():
    assert claude.with_structured_output(Person).invoke(PERSON) == ADA


@check
def messages_thinking():
    assert "short answer" in thinker.invoke(CAPITAL).content[0]["thinking"]


run()
