"""Does a model run in our caches as it runs alone? Which layers are packed; batches, resumed prefixes, prompt chunks.

Random codes stand for fitted ones: they lose what the model knows, but what was lost is the same in both of the runs
that are compared. Every row is told its tokens, so that two runs can be compared to their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from quant_core.backends.base import KernelBackend
from quant_core.cache.memory_plan import page_layout, plan_memory, ring_bytes
from quant_core.cache.packed_store import PackedStore
from quant_core.cache.plain_store import PlainStore
from quant_core.cache.side_by_side import reads_side_by_side
from quant_core.calibrate.layers import LayerSurvey, survey_layers
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.errors import QuantError
from quant_core.proof.random_codec import random_layer_codec

# Exact for so few tokens that short prompts read codes.
_WINDOW = WindowSpec(window=16, num_sink_tokens=4, bucket_len=128)
# Rows of the batch: tokens of the prompt, tokens answered, the step before which the row joins.
_ROWS = ((5, 20, 0), (150, 9, 0), (70, 16, 0), (33, 12, 2), (1, 9, 4), (97, 8, 5), (64, 10, 5), (129, 7, 6))
_CHUNK, _OTHER_CHUNK = 64, 23
_RESUMED_AT = 100
# What rounding explains: a code or an expert may be chosen otherwise once in a while, which the mean forgives and a
# wrong mask or position does not.
MEAN_LIMIT = {mx.float32: 0.04, mx.float16: 0.07, mx.bfloat16: 0.1}
# What mlx-lm raises where a model or its caches cannot do what they are asked for.
_REFUSALS = (QuantError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Agreement:
    """How far two ways of computing the same are apart.

    Attributes:
        mean, worst: norm of the difference of two next-token log-probabilities over the norm of one of them, both
            without their means, over all steps compared; 1.4 for two that have nothing in common.
        limit: of the mean.
        error: what was raised instead; empty where nothing was.
    """

    mean: float
    worst: float
    limit: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return not self.error and self.mean <= self.limit


@dataclass(frozen=True)
class ModelCheck:
    """What was found.

    Attributes:
        kinds: class of each layer's cache in mlx-lm, in order.
        packed: indices of the layers that are packed.
        others: why each other layer is not.
        exact: rows so short that nothing is read as codes, against mlx-lm's own caches.
        batch: eight rows that join and leave, against each alone.
        resume: a row resumed at a snapshot, against one that read everything.
        chunks: a prompt read in other pieces.
        reads_side_by_side: prompts of different lengths may be read at once.
    """

    kinds: tuple[str, ...]
    packed: tuple[int, ...]
    others: dict[int, str]
    exact: Agreement
    batch: Agreement
    resume: Agreement
    chunks: Agreement
    reads_side_by_side: bool

    @property
    def holds(self) -> bool:
        """Whether the model can be served as it is."""
        return self.exact.holds and self.batch.holds and self.resume.holds and self.chunks.holds


@dataclass(frozen=True)
class _ToldRow:
    """A row: its prompt, the tokens it is told, the step before which it joins."""

    prompt: list[int]
    told: list[int]
    joins: int


def check_model(model: Any, backend: KernelBackend | None = None) -> ModelCheck:
    """Run the model in our caches in several ways. MLX thread only; takes about 1,500 tokens' time.

    Raises:
        SpecError: a layer's cache cannot be batched by mlx-lm.
    """
    survey = survey_layers(model)
    store = _store(model, survey, backend)
    works = _works(int(model(mx.array([[1]])).shape[-1]))
    limit = MEAN_LIMIT[_dtype(model)]
    side_by_side = reads_side_by_side(model)
    at_once = 3 if side_by_side else 1
    alone = [_run(model, store, [work], _CHUNK)[0] for work in works]
    plain = PlainStore(model, 1 << 40, 1)
    exact = [_run(model, plain, [w], _CHUNK)[0] if _is_short(w) else None for w in works]

    def agreement(compare: Any) -> Agreement:
        try:
            pairs = compare()
        except _REFUSALS as error:
            return Agreement(1.0, 1.0, limit, f"{type(error).__name__}: {error}".splitlines()[0])
        apart = np.concatenate([np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1) for a, b in pairs])
        return Agreement(float(apart.mean()), float(apart.max()), limit)

    return ModelCheck(
        tuple(type(c).__name__ for c in make_prompt_cache(model)),
        tuple(sorted(survey.packable)),
        survey.others,
        agreement(lambda: [(a, b) for a, b in zip(exact, alone, strict=True) if a is not None]),
        agreement(lambda: zip(alone, _run(model, store, works, _CHUNK, rows_at_once=at_once), strict=True)),
        agreement(lambda: _resumed(model, store, works[1], alone[1])),
        agreement(lambda: [(alone[1], _run(model, store, [works[1]], _OTHER_CHUNK)[0])]),
        side_by_side,
    )


def _is_short(work: _ToldRow) -> bool:
    return _WINDOW.num_code_pages(len(work.prompt) + len(work.told)) == 0


def _store(model: Any, survey: LayerSurvey, backend: KernelBackend | None) -> PackedStore | PlainStore:
    if not survey.packable:
        return PlainStore(model, 1 << 40, len(_ROWS) + 1)
    layers = {
        i: random_layer_codec(
            g.num_kv_heads, VQSpec.for_bits(g.key_dim, 2), VQSpec.for_bits(g.value_dim, 2), g.rotary, seed=i
        )
        for i, g in survey.packable.items()
    }
    codec = ModelCodec("check", layers, _WINDOW)
    pages = 4 * sum(n + told for n, told, _ in _ROWS) // 64 + 16
    rings = 2 * len(_ROWS)
    budget = 2 * (rings * ring_bytes(codec) + pages * page_layout(codec).page_bytes) + (1 << 20)
    return PackedStore(model, codec, replace(plan_memory(codec, budget, rings), max_snapshot_bytes=1 << 40), backend)


def _works(vocab_size: int) -> list[_ToldRow]:
    rng = np.random.default_rng(0)
    return [
        _ToldRow(rng.integers(0, vocab_size, n).tolist(), rng.integers(0, vocab_size, told).tolist(), joins)
        for n, told, joins in _ROWS
    ]


def _run(
    model: Any, store: Any, works: Sequence[_ToldRow], chunk: int, caches: Sequence[Any] | None = None,
    rows_at_once: int = 1,
) -> list[np.ndarray[Any, np.dtype[np.float64]]]:  # fmt: skip
    """Centred log-probabilities `[told, vocab]` of each row, side by side in one BatchGenerator.

    Args:
        caches: of rows that hold part of their prompts; `prompt` is then the rest.
        rows_at_once: prompts read side by side.
    """
    generator = BatchGenerator(model, prefill_step_size=chunk, prefill_batch_size=rows_at_once)
    generator.close()
    found: dict[int, list[Any]] = {}
    rows: dict[int, int] = {}
    waiting = sorted(range(len(works)), key=lambda i: works[i].joins)
    step = 0
    while waiting or rows:
        while waiting and (works[waiting[0]].joins <= step or not rows):
            index = waiting.pop(0)
            work = works[index]
            row = store.new_row(store.reserve(len(work.prompt) + len(work.told))) if caches is None else caches[index]
            (uid,) = generator.insert([work.prompt], [len(work.told)], [row], samplers=[_teller(work.told)])
            rows[uid] = index
        _, responses = generator.next()
        store.flush([b.prompt_cache for b in (generator._generation_batch, generator._prompt_batch) if b.prompt_cache])
        for response in responses:
            found.setdefault(rows[response.uid], []).append(_centred(response.logprobs))
            response.prompt_cache = None
            if response.finish_reason is not None:
                del rows[response.uid]
        step += 1
    return [np.stack(found[i]) for i in range(len(works))]


def _centred(logprobs: mx.array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Without their mean; tokens that a model never says (-inf) are left out."""
    values = np.array(logprobs.astype(mx.float32), np.float64)
    said = np.isfinite(values)
    return np.where(said, values - values[said].mean(), 0.0)


def _teller(tokens: Sequence[int]) -> Any:
    """A sampler of one row that gives these tokens whatever the model says."""
    told = iter([*tokens, 0, 0])
    return lambda logprobs: mx.array([next(told)])


def _resumed(model: Any, store: Any, work: _ToldRow, cold: Any) -> list[tuple[Any, Any]]:
    """The row read to a snapshot, resumed there twice in one batch, against `cold`."""
    head, rest = work.prompt[:_RESUMED_AT], work.prompt[_RESUMED_AT:]
    total = len(work.prompt) + len(work.told)
    first = store.new_row(store.reserve(total))
    for at in range(0, len(head), _CHUNK):
        mx.eval(model(mx.array([head[at : at + _CHUNK]]), cache=first), [c.state for c in first])
    snapshot = store.snapshot(first, head)
    if snapshot is None:
        raise QuantError("no snapshot was taken")
    rows = [store.new_row(store.reserve(total, snapshot), snapshot) for _ in range(2)]
    resumed = _run(model, store, [replace(work, prompt=rest, joins=0)] * 2, _CHUNK, rows)
    snapshot.release()
    return [(cold, r) for r in resumed]


def _dtype(model: Any) -> mx.Dtype:
    dtype: mx.Dtype = model(mx.array([[1]])).dtype
    return dtype
