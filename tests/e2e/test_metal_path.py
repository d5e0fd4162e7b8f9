"""The server's whole Metal path without a Mac: start-up, self-test, launches and a chat answer, all on the harness."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.backends.choose import CompositeBackend
from quant_core.backends.metal import MetalBackend
from quant_core.codec.spec import WindowSpec
from quant_core.proof.random_codec import random_codec
from quant_core.proof.scenes import Case, model_cases
from quant_core.slices import Progress
from server.config import ServerConfig
from server.doctor import proof as doctor
from server.engine.loop import EngineLoop
from server.engine.request import GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from server.engine.scheduler import Loaded
from server.serving.startup import StartedModel, check_settings, start_up
from server.serving.stores import StoreMaker
from tests.helpers.tiny_models import build_tiny_model, write_tiny_model
from tests.msl_on_cpu import compiler, installed, last_results
from tests.server.engine.harness import ask, wait_until

NEAR_TIE = 0.3
QUESTION = "What is the capital of France, and what is it known for? " * 8
# Every kernel of a decode step, of a flush, and of a prompt read in chunks.
LAUNCHED = (
    "vq_append", "vq_encode", "vq_reconstruct", "vq_centre", "vq_extend", "vq_columns", "vq_turn",
    "vq_attention_queries", "vq_attention_partial", "vq_attention_merge",
)  # fmt: skip


def configuration(folder: Path, backend: str) -> ServerConfig:
    """A server of the tiny model with its artifact."""
    return ServerConfig.model_validate(
        {
            "model": {"name": str(folder / "model")}, "data_dir": folder / "data",
            "kv_cache": {"backend": backend, "pool_bytes": 32 << 20},
            "engine": {"max_num_seqs": 2, "prefill_tokens_per_step": 64},
            "calibration": {"auto": "block"},
        }
    )  # fmt: skip


def answer(config: ServerConfig) -> tuple[list[tuple[TokenLogprob, ...]], StartedModel]:
    """Start the server's engine as `vecinfer serve` does and ask it one question; per token its log-probabilities."""
    assert config.data_dir is not None
    check_settings(config)
    artifacts, started, ends = ArtifactStore(config.data_dir / "artifacts"), list[StartedModel](), list[int]()

    def startup() -> Generator[Progress, None, Loaded]:
        started.append((yield from start_up(config, artifacts, lambda line, fraction: None)))
        return started[0].loaded

    loop = EngineLoop(config, startup, exit_process=ends.append)
    loop.start()
    try:
        wait_until(lambda: loop.status().state not in ("loading", "testing", "calibrating"), 50)
        assert loop.status().state == "ready", loop.status().detail
        messages = [{"role": "user", "content": QUESTION}]
        prompt = started[0].loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert len(prompt) > 4 * 64, "the answer is to read codes"
        sampling = SamplingParams(temperature=0.0, num_logprobs=2, allow_eos=False)
        got = ask(loop, GenerationRequest("chat", tuple(prompt), sampling, 6))
        assert got.finish.reason == "length" and ends == []
        proved = loop.status().kv
        assert proved is not None and all(layer.packed for layer in proved.layers)
        return [entry for e in got.of(TokenEvent) for entry in e.logprobs], started[0]
    finally:
        loop.shutdown(0)


def test_a_chat_answer_through_every_metal_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler.available():
        pytest.skip(f"not run: {compiler.CLANG} is not installed")
    folder = write_tiny_model(tmp_path / "model", "llama")
    store, fingerprint = ArtifactStore(tmp_path / "data" / "artifacts"), model_fingerprint(build_tiny_model("llama"))
    codec = random_codec(2, 2, 64, window=WindowSpec(window=16, num_sink_tokens=4, bucket_len=64))
    store.set_active(fingerprint, store.put(codec, {}, fingerprint))
    assert folder.is_dir()
    monkeypatch.setattr("quant_core.cache.vq_cache.can_fuse", lambda *_: True)  # prompts are read as a GPU reads them
    wanted, _ = answer(configuration(tmp_path, "reference"))

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    backends: list[Any] = []
    make = StoreMaker.proven_store

    def remembered(self: StoreMaker, codec: Any) -> Any:
        made = yield from make(self, codec)
        backends.append(made.backend)
        return made

    def few(*arguments: Any) -> list[Case]:
        return [replace(c, query_lens=(1,), row_lens=(0, 65, 130)) for c in model_cases(*arguments)]

    monkeypatch.setattr(StoreMaker, "proven_store", remembered)
    monkeypatch.setattr(doctor, "model_cases", few)  # all sizes are tests/kernels' business
    with installed():
        got, started = answer(configuration(tmp_path, "metal"))
        launches = {name: last_results(name)[0] for name in LAUNCHED}
    (backend,) = backends
    assert isinstance(backend, CompositeBackend) and isinstance(backend.device, MetalBackend)
    assert backend.name == "metal" and "back end metal" in started.summary
    (verdict,) = json.loads((tmp_path / "data" / "verdicts.json").read_text()).values()
    assert [k["passed"] for k in verdict["verdict"]["kernels"]] == [True] * 8
    # The last decode step read codes, the pages of the prompt, of one layer; the last chunk at least a page of them.
    for name, num_pages in (("vq_attention_partial", 3), ("vq_columns", 1)):
        assert launches[name].traffic["pool"].read_unique >= num_pages * 64 * 2 * 2 * 16
    assert_same_up_to_near_ties(got, wanted)


def assert_same_up_to_near_ties(got: list[Any], wanted: list[Any]) -> None:
    """Greedy choices and their log-probabilities; after a near tie the two answers may part."""
    assert len(got) == len(wanted) == 6
    for (chosen, *_), (expected, first, second) in zip(got, wanted, strict=True):
        if chosen.token_id != expected.token_id:
            assert first.logprob - second.logprob < NEAR_TIE
            return
        assert chosen.logprob == pytest.approx(expected.logprob, abs=0.02)
