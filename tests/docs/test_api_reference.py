"""docs/api.md says what the program does: routes, parameters, error codes, metrics, and examples that work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.config import ServerConfig
from server.grammar.compile import GrammarCompiler
from server.http.app import create_app
from server.http.schemas.base import RequestBody
from server.http.schemas.calibration import CalibrationBody
from server.http.schemas.chat import ChatBody
from server.http.schemas.chat_message import ChatMessage
from server.http.schemas.completions import CompletionBody
from server.http.schemas.embeddings import EmbeddingBody
from server.http.schemas.generation import StreamOptions
from server.http.schemas.messages import MessagesBody, ThinkingField, ToolChoiceField
from server.http.schemas.response_items import InputItem
from server.http.schemas.responses import ReasoningField, ResponseBody, TextField
from server.http.schemas.sessions import RestoreBody, SessionBody
from server.http.schemas.tokens import DetokenizeBody, TokenizeBody
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.tiny_models import VOCAB_SIZE, tiny_tokenizer
from tests.server.http.test_embeddings import FakeEmbedder

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "api.md").read_text()
CURLS = re.findall(r"^curl .*?127\.0\.0\.1:8080(\S+) -d '(.*)'$", REFERENCE, re.MULTILINE)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    engine = FakeEngine(embedder=FakeEmbedder())
    # The fake tokenizer cannot guide answers.
    tokenizer = tiny_tokenizer(tmp_path)
    engine.grammars = GrammarCompiler(tokenizer, VOCAB_SIZE, tokenizer.eos_token_ids)
    yield create_app(ServerConfig(), engine)
    engine.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def headings() -> set[tuple[str, str]]:
    """(method, path) of the section headings; a method holds until the next one."""
    found: set[tuple[str, str]] = set()
    for line in re.findall(r"^## (.*/.*)$", REFERENCE, re.MULTILINE):
        method = ""
        for part in line.split(","):
            *words, path = part.split()
            method = words[0] if words else method
            found.add((method, path))
    return found


def test_every_route_has_a_heading(app: FastAPI) -> None:
    routes = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert len(routes) >= 15
    assert headings() == routes


@pytest.mark.parametrize(
    "body",
    [
        ChatBody,
        CompletionBody,
        EmbeddingBody,
        ResponseBody,
        InputItem,
        ReasoningField,
        TextField,
        TokenizeBody,
        DetokenizeBody,
        CalibrationBody,
        SessionBody,
        RestoreBody,
        ChatMessage,
        MessagesBody,
        ToolChoiceField,
        ThinkingField,
        StreamOptions,
    ],
)
def test_every_field_is_named(body: type[RequestBody]) -> None:
    names = {*body.model_fields, *body.aliases} | (
        {*body.silent, *body.unsupported} if body is not ChatMessage else set()
    )
    missing = [name for name in names if not re.search(rf'[`"{{ ]{name}[`":]', REFERENCE)]
    assert missing == []


def test_every_error_code_is_named() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    codes = set(re.findall(r'code(?:: str \| None)? ?= ?"([a-z_]+)"', sources))
    codes |= set(re.findall(r'ErrorEvent\([^)]*?"([a-z]+_[a-z_]+)"', sources))
    assert {"queue_full", "artifact_in_use", "engine_dead"} <= codes
    assert [code for code in sorted(codes) if f"`{code}`" not in REFERENCE] == []


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "body"), CURLS)
async def test_examples_do_what_they_show(app: FastAPI, path: str, body: str) -> None:
    json.loads(body)
    if path.startswith("/admin"):
        admin: type[CalibrationBody | SessionBody] = SessionBody if "sessions" in path else CalibrationBody
        admin.model_validate(json.loads(body)).check()
        return
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.post(path, content=body)
    assert answer.status_code == (400 if '"audio"' in body else 200), answer.text
    if answer.status_code == 400:
        shown = json.loads(re.findall(r'^\{"error".*?^```', REFERENCE, re.MULTILINE | re.DOTALL)[0].removesuffix("```"))
        assert answer.json() == shown


def test_there_are_examples() -> None:
    assert len(CURLS) >= 6
