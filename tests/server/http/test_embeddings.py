"""POST /v1/embeddings: over the wire, and of real small models."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from server.model.embedder import Embedder, read_pooling
from server.model.loader import load
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_tokenizer import FakeTokenizer
from tests.helpers.tiny_models import write_tiny_model
from tests.server.http.test_errors import error_of

URL = "/v1/embeddings"


class FakeEmbedder:
    """Two pieces a text; the vector says how many tokens it had."""

    names, context_len, tokenizer = ("tiny/embedder",), 64, FakeTokenizer()

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def start(self, ids: tuple[int, ...]) -> Any:
        answers = iter([None, [float(len(ids)), 0.0, 4.0]])
        return type("Run", (), {"advance": lambda self: next(answers)})()


@pytest.fixture
def client(engine: FakeEngine, client: httpx.AsyncClient) -> httpx.AsyncClient:
    engine.embedder = FakeEmbedder()
    return client


@pytest.mark.anyio
async def test_one_vector_a_text(client: httpx.AsyncClient) -> None:
    told = (await client.post(URL, json={"input": ["abc", [1, 2, 3, 4]], "model": "tiny/embedder"})).json()
    assert [d["embedding"] for d in told["data"]] == [[3.0, 0.0, 4.0], [4.0, 0.0, 4.0]]
    assert [d["index"] for d in told["data"]] == [0, 1] and told["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


@pytest.mark.anyio
async def test_base64_and_fewer_dimensions(client: httpx.AsyncClient) -> None:
    body = {"input": "abc", "encoding_format": "base64", "dimensions": 1}
    told = (await client.post(URL, json=body)).json()
    assert np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), "<f4").tolist() == [1.0]


@pytest.mark.anyio
async def test_what_cannot_be_embedded_is_named(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    cases = [{"input": []}, {"input": [9999]}, {"input": "x" * 65}, {"input": "a", "dimensions": 9}, {}]
    params = [error_of(await client.post(URL, json=case), 400)["param"] for case in cases]
    assert params == ["input", "input", "input", "dimensions", "input"]
    assert error_of(await client.post(URL, json={"input": "a", "model": "other"}), 404)["code"] == "model_not_found"
    engine.embedder = None
    assert "model.embedding_model" in error_of(await client.post(URL, json={"input": "a"}), 404)["message"]


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pieces_give_what_one_pass_gives(tmp_path: Path, pooling: str) -> None:
    folder = write_tiny_model(tmp_path, "qwen3")
    (folder / "1_Pooling").mkdir()
    key = {"mean": "mean_tokens", "last": "lasttoken", "first": "cls_token"}[pooling]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{key}": True}))
    embedder = Embedder(load(str(folder), tmp_path, lambda line, fraction: None), "tiny")
    ids = tuple(np.random.default_rng(0).integers(0, 500, 150).tolist())
    run = embedder.start(ids)
    vector = None
    while vector is None:
        vector = run.advance()
    states = embedder.model.model(mx.array([ids]), cache=make_prompt_cache(embedder.model))[0]
    expected = {"mean": states.mean(axis=0), "last": states[-1], "first": states[0]}[pooling]
    expected = np.array(expected / mx.linalg.norm(expected))
    assert np.allclose(vector, expected, atol=1e-4) and np.isclose(np.linalg.norm(vector), 1)


def test_without_a_pooling_file_the_mean_is_taken(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == "mean"
