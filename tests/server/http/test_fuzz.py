"""Whatever is sent, no answer is a 5xx and every error has the form of the API that was called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config import HTTPConfig, ServerConfig
from server.http.app import create_app
from server.http.schemas.calibration import CalibrationBody
from server.http.schemas.chat import ChatBody
from server.http.schemas.completions import CompletionBody
from server.http.schemas.embeddings import EmbeddingBody
from server.http.schemas.messages import MessagesBody, TokenCountBody
from server.http.schemas.responses import ResponseBody
from server.http.schemas.tokens import DetokenizeBody, TokenizeBody
from tests.helpers.fake_artifacts import FakeArtifacts, calibration_queue
from tests.helpers.fake_engine import FakeEngine, Script
from tests.server.http.conftest import ADMIN, AS_ADMIN, USER
from tests.server.http.test_calibration import Procedure
from tests.server.http.test_embeddings import FakeEmbedder

ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, {"messages": USER}),
    "/v1/completions": (CompletionBody, {"prompt": "a"}),
    "/v1/messages": (MessagesBody, {"messages": USER, "max_tokens": 4}),
    "/v1/messages/count_tokens": (TokenCountBody, {"messages": USER}),
    "/v1/responses": (ResponseBody, {"input": "a"}),
    "/v1/embeddings": (EmbeddingBody, {"input": "a"}),
    "/v1/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/v1/detokenize": (DetokenizeBody, {"tokens": [1]}),
    "/admin/calibrations": (CalibrationBody, {}),
}
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.sampled_from([0, -1, 2**31, 2**63, -(2**63), 10**40, 1e308, 0.5])
)
# Lone surrogates included: JSON can spell them, UTF-8 cannot.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
plausible = st.sampled_from(
    [
        True,
        1,
        2,
        0.5,
        "a",
        [],
        {},
        [1, 2],
        ["a"],
        [[1]],
        {"1": 2},
        {"type": "text"},
        {"include_usage": True},
        "auto",
        USER,
        [{"role": "system", "content": [{"type": "text", "text": "x"}]}, *USER],
        [{"role": "tool", "content": ""}],
        [*USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}],
        [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": None}]}],
        [{"name": "a", "input_schema": {"type": "object"}}],
        {"type": "any"},
        {"type": "adaptive"},
        [{"type": "reasoning", "summary": [], "encrypted_content": "vecinfer-text:x"}, *USER],
        [{"type": "function_call", "call_id": "a", "name": "b"}, {"type": "function_call_output", "call_id": "a"}],
        [{"type": "namespace", "name": "n", "tools": [{"name": "a"}]}],
        {"effort": "low", "summary": "auto"},
        {"format": {"type": "json_object"}},
    ]
)


def bodies(model: Any, base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A valid body with some fields, known or not, set to anything."""
    names = st.sampled_from(sorted({*model.model_fields, *model.silent, *model.unsupported, *model.aliases}))
    changes = st.dictionaries(st.one_of(names, names, names, texts), st.one_of(plausible, values), max_size=4)
    return changes.map(lambda changed: {**base, **changed})


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.AsyncClient]:
    engine = FakeEngine(Script(pieces=("a", "b")), embedder=FakeEmbedder())
    procedure = Procedure()
    procedure.gate.set()
    service = calibration_queue(engine, FakeArtifacts(), procedure)
    http = HTTPConfig(store_responses=True, max_stored_responses=20)
    config = ServerConfig(http=http, data_dir=tmp_path_factory.mktemp("data"))
    app = create_app(config, engine, keys=ADMIN, calibration=service)
    lifespan = app.router.lifespan_context(app)
    runner.run(lifespan.__aenter__())
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=AS_ADMIN)
    runner.run(lifespan.__aexit__(None, None, None))
    engine.close()


def check(answer: httpx.Response) -> None:
    # 429 from a full calibration queue is a good answer; a stream's errors come inside it.
    assert answer.status_code < 500, answer.text
    assert "internal_error" not in answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        is_anthropic = answer.request.url.path.startswith("/v1/messages")
        assert set(error) == ({"message", "type"} if is_anthropic else {"message", "type", "param", "code"})
        assert error["message"]


@pytest.mark.parametrize("route", ROUTES)
@quick
@given(data=st.data())
def test_any_json(runner: asyncio.Runner, client: httpx.AsyncClient, route: str, data: st.DataObject) -> None:
    body = data.draw(st.one_of(bodies(*ROUTES[route]), bodies(*ROUTES[route]), values))
    content = json.dumps(body).encode()
    check(runner.run(client.post(route, content=content)))


@pytest.mark.parametrize("route", ROUTES)
@quick
@given(content=st.binary(max_size=60))
def test_any_bytes(runner: asyncio.Runner, client: httpx.AsyncClient, route: str, content: bytes) -> None:
    check(runner.run(client.post(route, content=content)))


@settings(quick, max_examples=60)
@given(
    prefix=st.sampled_from(["/v1/models/", "/v1/responses/", "/admin/calibrations/", "/admin/artifacts/", "/"]),
    name=st.text(max_size=12),
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH"]),
)
def test_any_path(runner: asyncio.Runner, client: httpx.AsyncClient, prefix: str, name: str, method: str) -> None:
    answer = runner.run(client.request(method, prefix + quote(name, safe="/")))
    if answer.headers.get("content-type", "").startswith("application/json"):
        check(answer)
    assert answer.status_code < 500


@settings(quick, max_examples=60)
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["authorization", "content-length", "content-type", "x-api-key", "origin", "host", "forwarded"]
        ),
        st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b"")),
        max_size=3,
    )
)
def test_any_headers(runner: asyncio.Runner, client: httpx.AsyncClient, headers: dict[str, bytes]) -> None:
    raw = [(k.encode(), v) for k, v in headers.items()]
    check(runner.run(client.post("/v1/completions", content=b'{"prompt":"a"}', headers=raw)))
    check(runner.run(client.get("/admin/status", headers=raw)))
