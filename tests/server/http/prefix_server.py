"""A server with the packed cache of a tiny random model, and a disk tier where it is given a folder."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from quant_core.cache.memory_plan import plan_memory
from quant_core.cache.packed_store import PackedStore
from quant_core.proof.random_codec import random_codec
from server.access.keys import AccessKeys
from server.config import EngineConfig, HTTPConfig, PrefixCacheConfig, ServerConfig
from server.engine.loop import EngineLoop, Loaded
from server.http.app import create_app, http_server
from server.prefix_disk.disk import PrefixDisk
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer
from tests.server.http.conftest import ADMIN, AS_ADMIN, eventually, running
from tests.server.http.test_real_engine import Loading

Json = dict[str, Any]
CONTEXT = 8192
FINGERPRINT = "f" * 64


@contextmanager
def prefix_server(
    folder: Path,
    keys: AccessKeys = ADMIN,
    disk: Path | None = None,
    artifact: str = "art-1",
    fingerprint: str = FINGERPRINT,
    data_dir: Path | None = None,
    **prefix_cache: Any,
) -> Iterator[httpx.Client]:
    """A client of a running server, with the administrator's key; `disk` is the folder of the disk tier."""

    def start_up() -> Generator[Loading, None, Loaded]:
        yield Loading()
        model = build_tiny_model("llama", max_position_embeddings=CONTEXT)
        codec = replace(random_codec(2, 2, 64), artifact_id=artifact)
        store: Any = PackedStore(model, codec, plan_memory(codec, 96 << 20, 24, 0.4))
        tier = PrefixDisk(disk, 10**8) if disk is not None else None
        return Loaded(model, tiny_tokenizer(folder), "tiny", CONTEXT, store, disk=tier, fingerprint=fingerprint)

    config = ServerConfig(
        engine=EngineConfig(max_num_seqs=24),
        http=HTTPConfig(port=0),
        prefix_cache=PrefixCacheConfig(**prefix_cache),
        data_dir=data_dir,
    )
    engine = EngineLoop(config, start_up, exit_process=lambda code: None)
    engine.start()
    try:
        with (
            running(http_server(create_app(config, engine, keys=keys), config)) as port,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers=AS_ADMIN) as client,
        ):
            eventually(lambda: client.get("/readyz").status_code == 200, "readiness", timeout_s=20)
            yield client
    finally:
        engine.shutdown(0)


def asked(client: httpx.Client, prompt: str, **fields: Any) -> Json:
    """The answer to a prompt."""
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def num_cached(client: httpx.Client, prompt: str, **fields: Any) -> int:
    """Tokens of a prompt that were not read again."""
    found: int = asked(client, prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found
