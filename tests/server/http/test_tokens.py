"""POST /v1/tokenize and /v1/detokenize."""

from __future__ import annotations

import httpx
import pytest

from tests.server.http.conftest import USER
from tests.server.http.test_errors import error_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("field", ["prompt", "content"])
async def test_text_becomes_tokens_and_text_again(client: httpx.AsyncClient, field: str) -> None:
    told = (await client.post("/tokenize", json={field: "Grüße"})).json()
    assert told["tokens"] == list("Grüße".encode()) and told["count"] == 7 and told["max_model_len"] == 4096
    back = (await client.post("/v1/detokenize", json={"tokens": told["tokens"]})).json()
    assert back == {"prompt": "Grüße", "content": "Grüße"}


async def test_a_conversation_goes_through_the_template(client: httpx.AsyncClient) -> None:
    told = (await client.post("/v1/tokenize", json={"messages": USER, "return_token_strs": True})).json()
    assert told["tokens"][0] == 256 and told["tokens"][-1] == ord("\n")
    assert len(told["token_strs"]) == told["count"]


async def test_wrong_requests_are_named(client: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": USER}):
        assert error_of(await client.post("/v1/tokenize", json=body), 400)["param"] == "prompt"
    assert "258" in error_of(await client.post("/v1/detokenize", json={"tokens": [258]}), 400)["message"]
    assert error_of(await client.post("/v1/tokenize", json={"prompt": "x" * 600_000}), 400)["code"]


async def test_a_client_that_applies_the_template_itself_is_told_it(client: httpx.AsyncClient) -> None:
    told = (await client.get("/tokenizer_info")).json()
    assert told["chat_template"] == "{{ messages }}" and told["model_max_length"] == 4096
    assert {"bos_token", "eos_token", "pad_token", "unk_token"} < told.keys()
