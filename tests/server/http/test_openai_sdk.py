"""The official client as the judge of shapes and error classes, in process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from server.access.keys import AccessKeys
from server.config import ServerConfig
from server.http.app import create_app
from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import TEXT

try:  # the client's own HTTP library, which changed its name
    import httpx2 as sdk_httpx
except ImportError:
    import httpx as sdk_httpx  # type: ignore[no-redef]

pytestmark = pytest.mark.anyio
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def sdk(engine: FakeEngine) -> AsyncIterator[AsyncOpenAI]:
    app = create_app(ServerConfig(), engine, keys=AccessKeys(api=("sk-test",)))
    transport = sdk_httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        sdk_httpx.AsyncClient(transport=transport) as http_client,
        AsyncOpenAI(
            base_url="http://localhost/v1", api_key="sk-test", max_retries=0, http_client=http_client
        ) as client,
    ):
        yield client


async def test_chat(sdk: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script.cached_tokens = 3
    answer = await sdk.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_stream(sdk: AsyncOpenAI) -> None:
    chunks = await sdk.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    parts = [chunk async for chunk in chunks]
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == TEXT and parts[-1].usage is not None and parts[-1].usage.completion_tokens == 10


async def test_accumulating_stream_helper(sdk: AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(
        model="demo", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1
    ) as stream:
        final = await stream.get_final_completion()
    assert [c.message.content for c in final.choices] == [TEXT, TEXT]
    assert [c.finish_reason for c in final.choices] == ["stop", "stop"]
    logprobs = final.choices[1].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(t.token for t in logprobs.content) == TEXT


async def test_completions(sdk: AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="demo", prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert [c.text for c in answer.choices] == ["The capital"] * 2
    chunks = await sdk.completions.create(model="demo", prompt="a", stream=True)
    assert "".join([c.choices[0].text async for c in chunks]) == TEXT


async def test_models(sdk: AsyncOpenAI) -> None:
    listed = [model async for model in sdk.models.list()]
    assert [m.id for m in listed] == ["fake/model"]
    assert (await sdk.models.retrieve("demo")).id == "demo"


async def test_errors_map_to_the_clients_classes(sdk: AsyncOpenAI, engine: FakeEngine) -> None:
    create = sdk.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="demo", messages=[])
    assert bad.value.param == "messages" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="sk-wrong").models.list()
    engine.script.queue_free = 0
    with pytest.raises(openai.RateLimitError) as full:
        await create(model="demo", messages=MESSAGES)
    assert full.value.response.headers["retry-after"] == "7"
    engine.set_state("loading")
    with pytest.raises(openai.InternalServerError) as loading:
        await create(model="demo", messages=MESSAGES)
    assert loading.value.status_code == 503


async def test_an_error_in_a_stream_is_raised(sdk: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script.error_after = 3
    chunks = await sdk.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    seen = ""
    with pytest.raises(openai.APIError, match="the model broke"):
        async for chunk in chunks:
            seen += chunk.choices[0].delta.content or ""
    assert seen == "The capital of"
