"""Every method against the exact cache, side by side over the same windows, through their real caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from quant_core.cache.store import Caches
from quant_core.calibrate.evaluate import first_coded_position
from quant_core.codec.spec import WindowSpec
from quant_core.errors import CodecError
from quant_core.evaluation.measure import Held, measure
from quant_core.evaluation.methods.base import Method
from quant_core.losses import (
    Loss,
    PositionKL,
    PositionLosses,
    joined,
    kl_by_position,
    log_probs,
    position_losses,
    summarise,
)

Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ScoreOptions:
    """How windows are read.

    Attributes:
        chunk_tokens: of prefill, at a time.
        decode_tokens: last tokens of each window that are read one by one, through the decode path.
        position_step: positions per point of the curve of KL over position.
    """

    chunk_tokens: int = 512
    decode_tokens: int = 16
    position_step: int = 256


@dataclass(frozen=True)
class TextLoss:
    """One text's loss with one method."""

    text: str
    loss: Loss
    kl_by_position: tuple[PositionKL, ...]


@dataclass(frozen=True)
class MethodScore:
    """One method's row: the mean of its texts, each counting alike."""

    method: str
    key_bits: float
    value_bits: float
    window: int | None
    held: Held
    table_bytes: int
    loss: Loss
    per_text: tuple[TextLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """A row of the JSON's `results`."""
        return {
            "method": self.method,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "window": self.window,
            "code_bits_per_channel": self.held.code_bits_per_channel,
            "held_bits_per_channel": self.held.held_bits_per_channel,
            **dataclasses.asdict(self.loss),
            "held_bytes": self.held.held_bytes,
            "held_tokens": self.held.num_tokens,
            "table_bytes": self.table_bytes,
            "per_text": {
                t.text: {
                    **dataclasses.asdict(t.loss),
                    "kl_by_position": [dataclasses.asdict(p) for p in t.kl_by_position],
                }
                for t in self.per_text
            },
        }


def score(
    model: Any, methods: Sequence[Method], texts: Mapping[str, Windows], window: WindowSpec, options: ScoreOptions
) -> Generator[int, None, list[MethodScore]]:
    """Compare prepared `methods` on the windows of each text; yields the tokens done after each chunk.

    All methods are counted from the first position at which every packed cache reads codes, `window` or wider.

    Raises:
        CodecError: a window too short to read a code.
    """
    widest = max([window.window, *(m.window for m in methods if m.window is not None)])
    first = first_coded_position(dataclasses.replace(window, window=widest))
    shortest = min((len(w) for windows in texts.values() for w in windows), default=0)
    if shortest <= first + 1:
        raise CodecError(f"evaluation needs windows of more than {first + 1} tokens, the shortest has {shortest}")
    losses: dict[str, list[list[PositionLosses]]] = {text: [[] for _ in methods] for text in texts}
    held: list[Held] = []
    done = 0
    for text, windows in texts.items():
        for tokens in windows:
            caches = [m.new_caches(model) for m in methods]
            parts = yield from _window(model, caches, tokens, options, done)
            for column, part in zip(losses[text], parts, strict=True):
                column.append(part)
            held = [measure(c, len(tokens)) for c in caches]
            done += len(tokens)
    return [
        _result(method, held[i], {text: columns[i] for text, columns in losses.items()}, first, options.position_step)
        for i, method in enumerate(methods)
    ]


def refusal(model: Any, method: Method, tokens: Sequence[int]) -> str | None:
    """Why a prepared method cannot run here, found by reading `tokens` and one more; None: it can.

    MLX has no kernel for some shapes of mlx-lm's own quantised attention on some devices.
    """
    caches = method.new_caches(model)
    try:
        for part in (tokens, tokens[:1]):
            mx.eval(model(mx.array([list(part)]), cache=caches))
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def _window(
    model: Any, caches: Sequence[Caches], tokens: Sequence[int], options: ScoreOptions, done: int
) -> Generator[int, None, list[PositionLosses]]:
    """One window through the exact cache and through each method's."""
    exact = make_prompt_cache(model)
    parts: list[list[PositionLosses]] = [[] for _ in caches]
    for start, stop in chunks(len(tokens), options):
        chunk = mx.array([list(tokens[start:stop])])
        following = mx.array(list(tokens[start + 1 : stop + 1]), mx.int32)
        p = log_probs(model(chunk, cache=exact)[0])
        mx.eval(p)
        for part, cache in zip(parts, caches, strict=True):
            part.append(position_losses(p, log_probs(model(chunk, cache=cache)[0]), following))
        yield done + stop
    return [joined(part) for part in parts]


def chunks(num_tokens: int, options: ScoreOptions) -> list[tuple[int, int]]:
    """Spans read at a time: chunks of prefill, then the last tokens one by one."""
    prefill = max(1, num_tokens - options.decode_tokens)
    starts = list(range(0, prefill, options.chunk_tokens))
    spans = [(s, min(s + options.chunk_tokens, prefill)) for s in starts]
    return spans + [(i, i + 1) for i in range(prefill, num_tokens)]


def _result(method: Method, held: Held, texts: dict[str, list[PositionLosses]], first: int, step: int) -> MethodScore:
    per_text = tuple(TextLoss(t, summarise(w, first), kl_by_position(w, step)) for t, w in texts.items())
    means = [t.loss for t in per_text]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    loss = Loss(
        mean([m.kl_mean for m in means]),
        mean([m.kl_p99 for m in means]),
        mean([m.ppl_change for m in means]),
        mean([m.top1 for m in means]),
        sum(m.num_tokens for m in means),
    )
    return MethodScore(
        method.name, method.key_bits, method.value_bits, method.window, held, method.table_bytes, loss, per_text
    )
