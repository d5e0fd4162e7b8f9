"""PyPI guidance with an OpenAI-compatible server."""

from guidance import assistant, gen, user
from guidance import json as guided_json
from guidance.models import OpenAI
from harness import CAPITAL, KEY, MODEL, PERSON, PLAIN, check, run
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def model():
    return OpenAI(MODEL, api_key=KEY, base_url=f"{PLAIN}/v1", echo=False)


@check
def chat():
    lm = model()
    with user():
        lm += CAPITAL
    with assistant():
        lm += gen("answer")
    assert "Paris" in lm["answer"]


@check
def json_output():
    lm = model()
    with user():
        lm += PERSON
    with assistant():
        lm += guided_json("answer", schema=Person)
    assert Person.model_validate_json(lm["answer"]) == Person(name="Ada", age=36)


run()
