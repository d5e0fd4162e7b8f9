"""Fitted tables moved further by the loss itself: KL of the model's answers, read through its own codes.

k-means lowers the error of vectors; what counts is the error of answers. So windows of the fitting text are read with
every key and value that a query would read as a code replaced by its code's entry, and the tables follow the gradient
of KL(exact || coded). Codes are chosen anew at every step and count as constants; an entry's error passes on to earlier
layers as if it were the vector itself (straight-through, Bengio et al. 2013, arXiv:1308.3432). Transforms and means
stay. AQLM (arXiv:2401.06118, section 3.4) tunes codebooks of weights likewise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.attention.softmax import softmax
from quant_core.calibrate.kmeans_gpu import PIECE
from quant_core.codec import space as code_space
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.spec import NUM_CENTROIDS, PAGE_SIZE, Section, VQSpec, WindowSpec
from quant_core.codec.table_grid import snap

log = logging.getLogger(__name__)

# Tokens read at a time; memory grows with its square.
TUNING_LEN = 1024
# Tokens of the trial that measures a token's memory, and the share of the free memory a step may take.
TRIAL_LEN = 128
MEMORY_SHARE = 0.6
# Adam's, per channel of a sub-vector (the entries of a fine table lie closer), where vectors have RMS 1; falls to a
# tenth along a cosine.
LEARNING_RATE = 2.5e-3

# Per layer, the tables of keys and of values over d, section by section: `[Hkv, G, 256, d]` float32.
Tables = list[dict[str, list[mx.array]]]


@dataclass(frozen=True)
class TuningLoss:
    """Mean KL per coded position, in nats, of the first and the last windows of a tuning."""

    first: float
    last: float


def tune(
    model: Any, layers: dict[int, LayerCodec], windows: Sequence[Sequence[int]], window: WindowSpec, num_tokens: int
) -> Generator[int, None, tuple[dict[int, LayerCodec], TuningLoss | None]]:
    """The layers with better tables; yields the tokens read after each step.

    Args:
        num_tokens: tokens to read in all; the windows are gone through again and again.

    Returns:
        The layers as they were, and None, where the model cannot be read backwards: a layer is not packed, an
        operation has no gradient, or memory is short.
    """
    patch.install()
    if not num_tokens or not windows or len(layers) != len(make_prompt_cache(model)):
        return layers, None
    codecs = [layers[i] for i in sorted(layers)]
    try:
        numbers, loss = yield from _descend(model, codecs, windows, window, num_tokens)
    except (RuntimeError, ValueError) as error:  # an operation without a gradient, too little memory, an overflow
        log.warning("tables are not tuned: %s", error)
        return layers, None
    tuned = {
        i: replace(
            layers[i],
            keys=_with_tables(layers[i].keys, found["keys"]),
            values=_with_tables(layers[i].values, found["values"]),
        )
        for i, found in zip(sorted(layers), numbers, strict=True)
    }
    return tuned, loss


def _descend(
    model: Any, codecs: list[LayerCodec], windows: Sequence[Sequence[int]], window: WindowSpec, num_tokens: int
) -> Generator[int, None, tuple[Tables, TuningLoss]]:
    """Adam's steps; yields the tokens read after each.

    Raises:
        ValueError: windows too short to read codes, or a loss that is not finite; RuntimeError: MLX cannot.
    """
    # Adam moves every number alike; divided by d, the entries of large sub-vectors move further.
    numbers: Tables = [
        {kind: [c.astype(mx.float32) / c.shape[-1] for c in of.codebooks] for kind, of in _kinds(layer)}
        for layer in codecs
    ]
    length = _affordable_len(model, codecs, numbers, list(windows[0][:TRIAL_LEN]), window)
    parts = [list(w[at : at + length]) for w in windows for at in range(0, len(w), length)]
    parts = [p for p in parts if window.num_code_pages(len(p) - 1) > 0]
    num_steps = num_tokens * len(parts) // max(1, sum(map(len, parts)))
    if not num_steps:
        raise ValueError("memory or text is short for windows that read codes")
    adam = optim.Adam(optim.cosine_decay(LEARNING_RATE, num_steps, LEARNING_RATE / 10), betas=[0.9, 0.95])
    losses, done, stride = [], 0, _stride(len(parts))
    for step in range(num_steps):
        tokens = parts[step * stride % len(parts)]
        loss, gradient = _loss_and_gradient(model, codecs, numbers, tokens, window)
        numbers = adam.apply_gradients({"layers": gradient}, {"layers": numbers})["layers"]
        mx.eval(numbers, adam.state)
        total = float(np.array(loss))
        if not math.isfinite(total):
            raise ValueError("the loss overflows in the model's precision")
        losses.append(total / _num_coded(len(tokens), window))
        done += len(tokens)
        yield done
    share = max(1, min(len(parts), num_steps // 4))
    return numbers, TuningLoss(float(np.mean(losses[:share])), float(np.mean(losses[-share:])))


def _kinds(layer: LayerCodec) -> list[tuple[str, VectorCodec]]:
    return [("keys", layer.keys), ("values", layer.values)]


def _affordable_len(
    model: Any, codecs: list[LayerCodec], numbers: Tables, tokens: list[int], window: WindowSpec
) -> int:
    """TUNING_LEN, or the tokens that MEMORY_SHARE of the device's free memory is enough for, by a short trial.

    Memory is counted as if it grew with the tokens only; what grows with their square is small at TUNING_LEN.
    """
    info = mx.device_info()
    limit = int(info.get("max_recommended_working_set_size", 0) or info.get("total_memory", 0))
    if not limit or not tokens:
        return TUNING_LEN
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(_loss_and_gradient(model, codecs, numbers, tokens, window))
    per_token = max(1, (mx.get_peak_memory() - held) // len(tokens))
    affordable = int(MEMORY_SHARE * max(0, limit - held)) // per_token
    return min(TUNING_LEN, affordable // PAGE_SIZE * PAGE_SIZE) or 1


def _stride(num_parts: int) -> int:
    """A step through the parts that meets each once a round and texts that lie one after another in turn."""
    stride = max(1, round(num_parts * 0.382))
    while math.gcd(stride, num_parts) > 1:
        stride += 1
    return stride


def _num_coded(length: int, window: WindowSpec) -> int:
    """Positions whose queries read a code."""
    return max(1, length - (window.window + PAGE_SIZE - 1))


def _with_tables(codec: VectorCodec, numbers: list[mx.array]) -> VectorCodec:
    return replace(codec, codebooks=tuple(mx.array(snap(np.array(n * n.shape[-1])), mx.float16) for n in numbers))


def _loss_and_gradient(
    model: Any, codecs: list[LayerCodec], numbers: Tables, tokens: Sequence[int], window: WindowSpec
) -> tuple[mx.array, Any]:
    """Sum of KL over positions of one window, and its gradient with respect to the numbers: tables over d."""
    inputs = mx.array([list(tokens)])
    exact = model(inputs)[0].astype(mx.float32)
    exact = mx.stop_gradient(exact - mx.logsumexp(exact, axis=-1, keepdims=True))
    mx.eval(exact)

    def loss(now: Tables) -> mx.array:
        caches = [
            CodedCache(c, _tables(n["keys"]), _tables(n["values"]), window) for c, n in zip(codecs, now, strict=True)
        ]
        logits = model(inputs, cache=caches)[0].astype(mx.float32)
        coded = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total: mx.array = (mx.exp(exact) * (exact - coded)).sum()
        return total

    value, gradient = mx.value_and_grad(loss)(numbers)
    return value, gradient


def _tables(numbers: list[mx.array]) -> list[mx.array]:
    return [n * n.shape[-1] for n in numbers]


class CodedCache(patch.ViewCache):
    """One layer's cache of a single row, read once from its start: coded tokens are their tables' entries.

    Args:
        codec: transforms and means.
        key_tables, value_tables: per section `[Hkv, G, 256, d]` float32, in the place of the codec's.
        window: which tokens a query reads exactly.
    """

    bits = 8
    group_size = 64

    def __init__(
        self, codec: LayerCodec, key_tables: list[mx.array], value_tables: list[mx.array], window: WindowSpec
    ) -> None:
        self.offset = 0
        self._codec = codec
        self._tables = key_tables, value_tables
        self._window = window
        self._held: tuple[mx.array, mx.array] | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Of the values; some models cast attention's result to it."""
        assert self._held is not None  # asked for after update_and_fetch
        return self._held[1].dtype

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[CodedCache, CodedCache]:
        """Take the keys and values of the whole window; returns the view to attend to, twice."""
        self._held = keys, values
        self.offset = keys.shape[2]
        return self, self

    def attend(self, queries: mx.array, scale: float, sink_logits: mx.array | None = None) -> mx.array:
        """Causal attention of `queries [1, Hq, L, D]`."""
        assert self._held is not None  # update_and_fetch comes first
        # The scores are made anew on the way back: kept, they would be most of the memory.
        attend = mx.checkpoint(lambda *arrays: self._attend(*arrays, scale=scale, sink_logits=sink_logits))
        out: mx.array = attend(queries, *self._held, *self._tables[0], *self._tables[1])
        return out

    def _attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *tables: mx.array,
        scale: float,
        sink_logits: mx.array | None,
    ) -> mx.array:
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
        coded_keys, coded_values = (x[:, :, None] for x in self._through_codes(keys, values, tables))
        keys, values = keys[:, :, None], values[:, :, None]
        length, positions = queries.shape[2], np.arange(queries.shape[2])
        ends = np.array([self._window.num_code_pages(int(p)) for p in positions]) * PAGE_SIZE
        coded = mx.array((positions >= self._window.num_sink_tokens) & (positions < ends[:, None]))
        causal = mx.array(positions <= positions[:, None])
        q = (queries.astype(mx.float32) * scale).reshape(1, keys.shape[1], -1, length, queries.shape[-1])
        scores = mx.where(coded, q @ coded_keys.swapaxes(-1, -2), q @ keys.swapaxes(-1, -2))
        weights = softmax(mx.where(causal, scores, -mx.inf), sink_logits)
        out = mx.where(coded, weights, 0) @ coded_values + mx.where(coded, 0, weights) @ values
        return out.reshape(1, -1, length, out.shape[-1]).astype(queries.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """None or "causal", as for mlx-lm's plain cache."""
        return "causal" if N > 1 else None

    def empty(self) -> bool:
        """Whether nothing was read."""
        return self._held is None

    @property
    def state(self) -> list[mx.array]:
        """Every array held, for models that evaluate caches."""
        return list(self._held or ())

    def _through_codes(self, keys: mx.array, values: mx.array, tables: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """What a reader of codes would see of `[1, Hkv, L, D]` keys and values."""
        codec, positions = self._codec, np.arange(keys.shape[2])[None]
        k_in = code_space.keys_in(keys, positions, codec, self._window.bucket_len)
        v_in = code_space.values_in(values, codec)
        of_keys, of_values = tables[: len(self._tables[0])], tables[len(self._tables[0]) :]
        k = through_tables(k_in[0], of_keys, codec.keys.spec) @ codec.keys.inverse + codec.keys.mean[:, None]
        if codec.rotary is not None:
            cos, sin = code_space.bucket_angles(codec.rotary, self._window.bucket_len, positions)
            k = codec.rotary.apply(k, cos, sin)
        v = through_tables(v_in[0], of_values, codec.values.spec) @ codec.values.inverse
        return k[None], (v + codec.values.mean[:, None])[None]


def through_tables(vectors: mx.array, tables: Sequence[mx.array], spec: VQSpec) -> mx.array:
    """The nearest entries in the place of `vectors [Hkv, n, D]`; differentiable in both, in the vectors as if equal."""
    heads, num, _ = vectors.shape
    parts = []
    for section, table in zip(spec.sections, tables, strict=True):
        x = vectors[..., section.channel_start : section.channel_start + section.num_channels]
        x = x.reshape(heads, num, section.num_subvecs, section.subvec_dim).swapaxes(1, 2)
        per_subvec = _dealt_out(table, section)
        chosen = mx.stop_gradient(per_subvec)
        products = mx.stop_gradient(x) @ chosen.swapaxes(-1, -2) - 0.5 * (chosen**2).sum(-1)[:, :, None]
        codes = mx.stop_gradient(mx.argmax(products, axis=-1))
        entries = look_up(per_subvec, codes)
        assert isinstance(entries, mx.array)
        found = entries + (x - mx.stop_gradient(x))
        parts.append(found.swapaxes(1, 2).reshape(heads, num, -1))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _dealt_out(table: mx.array, section: Section) -> mx.array:
    """Each sub-vector's table, `[Hkv, M, 256, d]` of `[Hkv, G, 256, d]`, by a product (see look_up's gradient)."""
    owner = np.array([section.codebook_of(j) for j in range(section.num_subvecs)])
    choice = mx.array((owner[:, None] == np.arange(section.num_codebooks)).astype(np.float32))
    flat = choice @ table.reshape(*table.shape[:2], -1)
    return flat.reshape(table.shape[0], section.num_subvecs, *table.shape[2:])


@mx.custom_function
def look_up(tables: mx.array, codes: mx.array) -> mx.array:
    """Entries `[H, M, n, d]` of `tables [H, M, 256, d]` at `codes [H, M, n]`."""
    return mx.take_along_axis(tables, codes[..., None], axis=2)


@look_up.vjp
def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    """Sums by products with one-hot matrices: additions in no order would make every run another."""
    _, codes = primals
    heads, subvecs, num = codes.shape
    filler = [(0, 0), (0, 0), (0, -num % PIECE)]
    pieces = mx.pad(codes, filler).reshape(heads, subvecs, -1, PIECE)
    hits = (pieces[..., None] == mx.arange(NUM_CENTROIDS)).astype(cotangent.dtype)
    moved = mx.pad(cotangent, [*filler, (0, 0)]).reshape(heads, subvecs, -1, PIECE, cotangent.shape[-1])
    return (hits.swapaxes(-1, -2) @ moved).sum(2), mx.zeros_like(codes)
