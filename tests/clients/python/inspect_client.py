"""PyPI inspect-ai: an evaluation, a tool loop and structured output."""

import os

from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, run
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

os.environ["INSPECT_DISPLAY"] = "none"


class Person(BaseModel):
    name: str
    age: int


@tool
def get_weather():
    async def execute(city: str):
        """The weather in a city.

        Args:
            city: the city's name.
        """
        return f"18 degrees in {city}"

    return execute


def model(**fields):
    return get_model(f"openai-api/vecinfer/{MODEL}", base_url=f"{PLAIN}/v1", api_key=KEY, memoize=False, **fields)


def score(prompt, target, solver, using=None):
    task = Task(dataset=[Sample(input=prompt, target=target)], solver=solver, scorer=includes())
    (log,) = evaluate(task, model=using or model(), log_dir="logs", display="none")
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1.0


@check
def evaluation():
    score(CAPITAL, "Paris", [generate()])


@check
def tools():
    score(WEATHER, "18 degrees", [use_tools(get_weather()), generate()])


@check
def structured():
    schema = ResponseSchema(name="person", json_schema=json_schema(Person))
    score(PERSON, "Ada", [generate()], model(config=GenerateConfig(response_schema=schema)))


@check
def logprobs():
    score(CAPITAL, "Paris", [generate()], model(config=GenerateConfig(logprobs=True, top_logprobs=2)))


run()
