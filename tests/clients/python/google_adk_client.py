"""PyPI google-adk with its LiteLlm model."""

from google.adk.agents import Agent
from google.adk.models.lite_llm import LiteLlm
from google.adk.runners import InMemoryRunner
from google.genai import types
from harness import CAPITAL, KEY, MODEL, PLAIN, WEATHER, check, get_weather, run


async def final(prompt, **fields):
    model = LiteLlm(model=f"openai/{MODEL}", api_base=f"{PLAIN}/v1", api_key=KEY)
    runner = InMemoryRunner(agent=Agent(name="helper", model=model, instruction="Be brief.", **fields), app_name="app")
    session = await runner.session_service.create_session(app_name="app", user_id="user")
    message = types.Content(role="user", parts=[types.Part(text=prompt)])
    text = ""
    async for event in runner.run_async(user_id="user", session_id=session.id, new_message=message):
        if event.is_final_response() and event.content:
            text = "".join(part.text or "" for part in event.content.parts)
    return text


@check
async def chat():
    assert "Paris" in await final(CAPITAL)


@check
async def tools():
    assert "18 degrees" in await final(WEATHER, tools=[get_weather])


run()
