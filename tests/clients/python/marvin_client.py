"""PyPI marvin: a task and an extraction, over pydantic-ai."""

import os

from harness import KEY, MODEL, PERSON, PLAIN, check, run

os.environ["MARVIN_DATABASE_URL"] = "sqlite+aiosqlite:///marvin.db"
os.environ["MARVIN_ENABLE_DEFAULT_PRINT_HANDLER"] = "false"

import marvin
from pydantic import BaseModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


@check
def cast():
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{PLAIN}/v1", api_key=KEY))
    agent = marvin.Agent(model=model)
    assert marvin.cast(PERSON, target=Person, agent=agent) == Person(name="Ada", age=36)


run()
