"""PyPI crewai: an agent with a task and a tool."""

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


@tool("get_weather")
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"18 degrees in {city}"


def llm():
    return LLM(model=f"openai/{MODEL}", base_url=f"{PLAIN}/v1", api_key=KEY)


def crew(text, tools=(), **fields):
    agent = Agent(role="helper", goal="answer", backstory="brief", llm=llm(), tools=list(tools), max_iter=4)
    task = Task(description=text, expected_output="an answer", agent=agent, **fields)
    return Crew(agents=[agent], tasks=[task], verbose=False).kickoff()


@check
def call():
    assert "Paris" in llm().call(CAPITAL)


@check
def task():
    assert "Paris" in str(crew(CAPITAL))


@check
def tools():
    assert "18 degrees" in str(crew(WEATHER, [get_weather]))


@check
def output_pydantic():
    assert crew(PERSON, output_pydantic=Person).pydantic == Person(name="Ada", age=36)


run()
