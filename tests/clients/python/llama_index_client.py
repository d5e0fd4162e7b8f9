"""PyPI llama-index with its OpenAI-like model."""

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, get_weather, run
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def model(**fields):
    return OpenAILike(
        model=MODEL,
        api_base=f"{PLAIN}/v1",
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=32768,
        max_retries=0,
        **fields,
    )


@check
def chat():
    assert "Paris" in str(model().chat([ChatMessage(role="user", content=CAPITAL)]))


@check
def stream():
    *_, last = model().stream_chat([ChatMessage(role="user", content=CAPITAL)])
    assert "Paris" in str(last.message.content)


@check
def completions():
    llm = OpenAILike(model=MODEL, api_base=f"{PLAIN}/v1", api_key=KEY, is_chat_model=False, max_tokens=2)
    assert str(llm.complete("The capital of France is")) == " Paris."


@check
async def agent():
    assert "18 degrees" in str(await FunctionAgent(tools=[get_weather], llm=model()).run(WEATHER))


@check
def structured_by_tool():
    from llama_index.core.prompts import PromptTemplate

    assert model().structured_predict(Person, PromptTemplate(PERSON)) == Person(name="Ada", age=36)


@check
def structured_by_schema():
    llm = model(should_use_structured_outputs=True)
    answer = llm.as_structured_llm(Person).chat([ChatMessage(role="user", content=PERSON)])
    assert answer.raw == Person(name="Ada", age=36)


run()
