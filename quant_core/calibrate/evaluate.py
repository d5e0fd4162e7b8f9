"""The loss of a codec on held-out text, through the real packed caches and mlx-lm's exact ones side by side."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import choose_backend
from quant_core.cache.packed_store import build_caches
from quant_core.calibrate.layer_loss import LayerLoss, TappedCache, layer_loss, tap
from quant_core.calibrate.report import MAX_SPANS, EvaluationReport, LayerReport, TextReport
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import PAGE_SIZE, WindowSpec
from quant_core.errors import CodecError
from quant_core.losses import PositionLosses, joined, log_probs, position_losses, summarise
from quant_core.slices import always, mapped


@dataclass(frozen=True, eq=False)
class WindowLoss:
    """One window's losses per position, the bytes its packed layers held at the end, and each layer's own errors."""

    losses: PositionLosses
    held_bytes: int
    layers: dict[int, LayerLoss]


def evaluate(
    model: Any,
    codec: ModelCodec,
    windows: Sequence[Sequence[int]],
    *,
    slice_tokens: int = 64,
    backend: KernelBackend | None = None,
) -> Generator[int, None, EvaluationReport]:
    """Compare caches on each window; yields the tokens done after each slice.

    Raises:
        CodecError: no window is long enough to read a code.
    """
    first = first_coded_position(codec.window)
    losses, done = [], 0
    for tokens in windows:
        if len(tokens) > first + 1:
            loss = yield from window_loss(model, codec, tokens, slice_tokens, backend, done)
            losses.append(loss)
            done += len(tokens)
    if not losses:
        longest = max((len(w) for w in windows), default=0)
        raise CodecError(
            f"evaluation needs a window of more than {first + 1} tokens, the longest has {longest}; give more text"
        )
    return _report(codec, losses, first, len(make_prompt_cache(model)))


def first_coded_position(window: WindowSpec) -> int:
    """The first position whose query reads a page as codes."""
    return window.window + PAGE_SIZE - 1


def window_loss(
    model: Any, codec: ModelCodec, tokens: Sequence[int], slice_tokens: int, backend: KernelBackend | None, done: int
) -> Generator[int, None, WindowLoss]:
    """One window through both caches in chunks of `slice_tokens`."""
    backend = backend or choose_backend("auto")
    exact, packed = make_prompt_cache(model), build_caches(model, codec, backend)
    parts: list[PositionLosses] = []
    taps: dict[int, TappedCache] = {}
    for start in range(0, len(tokens), slice_tokens):
        if start + slice_tokens >= len(tokens):
            taps = tap(exact, codec.layers)
        chunk = mx.array([list(tokens[start : start + slice_tokens])])
        following = mx.array(list(tokens[start + 1 : start + 1 + chunk.shape[1]]))
        p = log_probs(model(chunk, cache=exact)[0])
        mx.eval(p)
        yield done + start
        parts.append(position_losses(p, log_probs(model(chunk, cache=packed)[0]), following))
        yield done + min(len(tokens), start + slice_tokens)
    held_bytes, layers = sum(int(packed[i].nbytes) for i in codec.layers), dict[int, LayerLoss]()
    exact.clear()
    del packed
    for index in list(taps):
        work = layer_loss(taps.pop(index), codec.layers[index], codec.window, backend)
        layers[index] = yield from mapped(work, always(done + len(tokens)))
    return WindowLoss(joined(parts), held_bytes, layers)


def _report(codec: ModelCodec, losses: list[WindowLoss], first: int, num_layers: int) -> EvaluationReport:
    whole = summarise([x.losses for x in losses], first)
    if not np.isfinite(whole.kl_mean):
        raise CodecError("logits through the packed cache are not finite; the codec cannot be used")
    dims = [(c.num_kv_heads, spec) for c in codec.layers.values() for spec in (c.keys.spec, c.values.spec)]
    channels = sum(heads * spec.head_dim for heads, spec in dims)
    num_tokens = sum(len(x.losses.kl) for x in losses)
    by_window = [summarise([x.losses], first) for x in losses]
    return EvaluationReport(
        kl_mean=whole.kl_mean,
        kl_p99=whole.kl_p99,
        ppl_change=whole.ppl_change,
        top1=whole.top1,
        code_bits_per_channel=sum(heads * 8 * spec.code_bytes for heads, spec in dims) / channels,
        held_bits_per_channel=sum(8 * x.held_bytes for x in losses) / (num_tokens * channels),
        num_tokens=whole.num_tokens,
        num_layers_packed=len(codec.layers),
        num_layers=num_layers,
        per_text=tuple(TextReport(w.kl_mean, w.ppl_change, w.top1, w.num_tokens) for w in by_window),
        kl_by_position=kl_by_position([x.losses.kl for x in losses], first),
        per_layer=tuple(_layer_report(i, c, losses) for i, c in sorted(codec.layers.items())),
    )


def _layer_report(index: int, codec: LayerCodec, losses: list[WindowLoss]) -> LayerReport:
    whole = sum((x.layers[index] for x in losses), LayerLoss())
    found = [part.relative for part in (whole.keys, whole.values, whole.output)]
    if not np.isfinite(found).all():
        raise CodecError(f"layer {index}: keys, values or attention overflow on the held-out text")
    return LayerReport(index, codec.keys.spec.bits_per_channel, codec.values.spec.bits_per_channel, *found)


def kl_by_position(windows: Sequence[NDArray[np.floating[Any]]], first: int) -> tuple[tuple[int, float], ...]:
    """(first position, mean KL over all windows) of spans of whole pages, from position `first` on.

    Args:
        windows: `[T]` per window, nats.
    """
    longest = max(len(kl) for kl in windows)
    span = PAGE_SIZE * max(1, -(-(longest - first) // (PAGE_SIZE * MAX_SPANS)))
    found = []
    for start in range(first, longest, span):
        values = np.concatenate([np.asarray(kl[start : start + span]) for kl in windows])
        if len(values):
            found.append((start, float(values.mean())))
    return tuple(found)
