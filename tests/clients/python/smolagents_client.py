"""PyPI smolagents: the tool calling agent and the code agent."""

from harness import CAPITAL, KEY, MODEL, PLAIN, WEATHER, check, run
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id=MODEL, api_base=f"{PLAIN}/v1", api_key=KEY)


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city.

    Args:
        city: the city's name.
    """
    return f"18 degrees in {city}"


@check
def chat():
    assert "Paris" in model([{"role": "user", "content": [{"type": "text", "text": CAPITAL}]}]).content


@check
def stream():
    pieces = model.generate_stream([{"role": "user", "content": [{"type": "text", "text": CAPITAL}]}])
    assert "Paris" in "".join(p.content or "" for p in pieces)


@check
def tool_calling_agent():
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=4, verbosity_level=0)
    assert "18 degrees" in str(agent.run(WEATHER))


@check
def tool_calling_agent_stream():
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=4, verbosity_level=0, stream_outputs=True)
    assert "18 degrees" in str(agent.run(WEATHER))


run()
