"""The OpenAPI document is the contract: what is answered is described."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.helpers.fake_engine import FakeEngine
from tests.server.http.conftest import AS_ADMIN, USER, in_process

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(m, p, o) for p, methods in document["paths"].items() for m, o in methods.items()]


async def test_every_operation_tells_its_errors_and_keys(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        responses = operation["responses"]
        assert "422" not in responses and "default" in responses, (method, path)
        if path.startswith("/v1"):
            assert {"400", "401", "403", "404", "503"} <= set(responses) and {} in operation["security"]
        if path.startswith("/admin"):
            assert {"401", "404"} <= set(responses) and {} not in operation["security"]
        if "requestBody" in operation:
            assert {"413", "415", "429"} <= set(responses)
    assert "text/event-stream" in document["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}


async def test_errors_are_as_described(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    validator = Draft202012Validator(document["components"]["schemas"]["Error"])
    for path in (CHAT, "/v1/messages", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/tokenize"):
        for content in (b"", b"[]", b"{}", b'{"messages": 5, "prompt": {}, "input": {}}'):
            answer = await client.post(path, content=content)
            assert str(answer.status_code) in document["paths"][path]["post"]["responses"], (path, content)
            validator.validate(answer.json())


async def test_a_null_is_described_as_it_is_taken(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    body = document["components"]["schemas"]["ChatBody"]
    optional = [name for name in body["properties"] if name not in body["required"]]
    nulls: dict[str, Any] = {"messages": USER, **dict.fromkeys(optional), "x_unknown": 1}
    schema = {**body, "components": document["components"], "$defs": document["components"]["schemas"]}
    Draft202012Validator(schema).validate(nulls)
    assert (await client.post(CHAT, json=nulls)).status_code == 200


async def test_a_cancelled_calibration_is_a_202(document: dict[str, Any]) -> None:
    path = "/admin/calibrations/{job_id}"
    for operation in (document["paths"][path]["delete"], document["paths"][f"{path}/cancel"]["post"]):
        assert "202" in operation["responses"] and "200" not in operation["responses"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/responses/resp_1", {"GET", "HEAD", "DELETE"}),
        ("/admin/calibrations", {"GET", "HEAD", "POST"}),
        ("/livez", {"GET", "HEAD"}),
        (CHAT, {"POST"}),
    ],
)
async def test_allow_names_every_method(client: httpx.AsyncClient, path: str, allowed: set[str]) -> None:
    answer = await client.put(path, headers=AS_ADMIN)
    assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/", "/v1/models", "/metrics"])
async def test_head_is_answered_as_get(engine: FakeEngine, path: str) -> None:
    answer = await in_process(engine).head(path)
    assert answer.status_code == 200 and answer.content == b""


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
async def test_no_page_loads_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    """FastAPI's own documentation comes from a CDN; what a browser gets here names no other host."""
    assert (await client.get(path, headers={"accept": "text/html"})).status_code == 404
    page = await client.get("/", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html") and "://" not in page.text
