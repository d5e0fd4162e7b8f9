"""PyPI griptape: an agent over its OpenAI prompt driver."""

from griptape.drivers.prompt.openai import OpenAiChatPromptDriver
from griptape.structures import Agent
from harness import CAPITAL, KEY, MODEL, PLAIN, check, run


def agent(**fields):
    driver = OpenAiChatPromptDriver(model=MODEL, base_url=f"{PLAIN}/v1", api_key=KEY, **fields)
    return Agent(prompt_driver=driver)


@check
def chat():
    assert "Paris" in str(agent().run(CAPITAL).output)


@check
def stream():
    assert "Paris" in str(agent(stream=True).run(CAPITAL).output)


run()
