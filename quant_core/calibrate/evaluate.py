"""The loss of a codec on held-out text, through the real packed caches and mlx-lm's exact ones side by side."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from quant_core.backends.base import KernelBackend
from quant_core.cache.packed_store import build_caches
from quant_core.calibrate.report import EvaluationReport, TextReport
from quant_core.codec import ModelCodec
from quant_core.errors import CodecError
from quant_core.spec import PAGE_SIZE, WindowSpec

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class WindowLoss:
    """Per position of one window: KL in nats, negative log-likelihood exact and packed, whether the best agree.

    `kl[i]` and `same[i]` are of the distribution after token i; the likelihoods of token i + 1 under it.
    """

    kl: Array
    nll_exact: Array
    nll_packed: Array
    same: Array
    held_bytes: int


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
    exact, packed = make_prompt_cache(model), build_caches(model, codec, backend)
    parts: list[list[Array]] = []
    for start in range(0, len(tokens), slice_tokens):
        chunk = mx.array([list(tokens[start : start + slice_tokens])])
        following = mx.array(list(tokens[start + 1 : start + 1 + chunk.shape[1]]))
        p = _log_probs(model(chunk, cache=exact))
        mx.eval(p)
        yield done + start
        q = _log_probs(model(chunk, cache=packed))
        n = following.shape[0]
        kl = (mx.exp(p) * (p - q)).sum(-1)
        same = mx.argmax(p, -1) == mx.argmax(q, -1)
        nll = [-mx.take_along_axis(x[:n], following[:, None], -1)[:, 0] for x in (p, q)]
        mx.eval(kl, same, nll)
        parts.append([np.array(a) for a in (kl, *nll, same)])
        yield done + min(len(tokens), start + slice_tokens)
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    held = sum(int(packed[i].nbytes) for i in codec.layers)
    return WindowLoss(joined[0], joined[1], joined[2], joined[3], held)


def _log_probs(logits: mx.array) -> mx.array:
    x = logits[0].astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _report(codec: ModelCodec, losses: list[WindowLoss], first: int, num_layers: int) -> EvaluationReport:
    kl = np.concatenate([x.kl[first:] for x in losses])
    exact = np.concatenate([x.nll_exact[first:] for x in losses])
    packed = np.concatenate([x.nll_packed[first:] for x in losses])
    if not np.isfinite(kl).all():
        raise CodecError("logits through the packed cache are not finite; the codec cannot be used")
    dims = [(c.num_kv_heads, spec) for c in codec.layers.values() for spec in (c.keys.spec, c.values.spec)]
    channels = sum(heads * spec.head_dim for heads, spec in dims)
    num_tokens = sum(len(x.kl) for x in losses)
    return EvaluationReport(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        ppl_change=float(np.expm1((packed - exact).mean())),
        top1=float(np.concatenate([x.same[first:] for x in losses]).mean()),
        code_bits_per_channel=sum(heads * 8 * spec.code_bytes for heads, spec in dims) / channels,
        held_bits_per_channel=sum(8 * x.held_bytes for x in losses) / (num_tokens * channels),
        num_tokens=len(kl),
        num_layers_packed=len(codec.layers),
        num_layers=num_layers,
        per_text=tuple(
            TextReport(
                float(x.kl[first:].mean()),
                float(np.expm1((x.nll_packed[first:] - x.nll_exact[first:]).mean())),
                float(x.same[first:].mean()),
                len(x.kl) - first,
            )
            for x in losses
        ),
    )
