"""mlx-lm's decode step for rows that are held to something: masks are made while the device runs the forward pass.

mlx-lm builds step t + 1 before token t is known to Python. A mask for token t + 1 depends on token t, so the step is
cut in two: the forward pass is submitted on the still unread token t; while it runs, token t is read (the step before
has made it), constraints take it and write their masks; then mask and sampling are submitted behind the forward pass.
The device is never without work, and the cache holds exactly what mlx-lm's own step leaves in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch, StopSequences
from numpy.typing import NDArray

from server.grammar.constraint import RowConstraint
from server.grammar.mask import num_words

_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


class RowStops(StopSequences):  # type: ignore[misc]
    """What ends a row and what holds it; mlx-lm carries this object from the prompt to the last token."""

    def __init__(self, end_ids: Sequence[int], constraint: RowConstraint | None = None) -> None:
        super().__init__([[i] for i in end_ids])
        self.constraint = constraint


def hold_rows(generator: BatchGenerator) -> None:
    """Let a generator without rows heed the constraints of the `RowStops` that its rows are inserted with."""
    generator._generation_batch = HeldBatch.empty(generator.model, generator.sampler)
    generator._prompt_batch = HeldPrompts.empty(
        generator.model, generator.sampler, prefill_step_size=generator.prefill_step_size
    )


class HeldPrompts(PromptProcessingBatch):  # type: ignore[misc]
    """Prompts whose first token may be constrained already."""

    # mlx-lm's, which has no types.
    uids: list[int]
    prompt_cache: list[Any]
    tokens: list[list[int]]
    samplers: list[Any]
    logits_processors: list[Any]
    stop_sequences: list[StopSequences]
    max_tokens: list[int]

    def generate(self, tokens: list[list[int]]) -> HeldBatch:
        """The rows with their first token submitted; `tokens` are the last one of each prompt."""
        batch = HeldBatch(
            self.model,
            self.uids,
            mx.array([t[-1] for t in tokens]),
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )
        # The rows are the new batch's from here on.
        self.uids, self.prompt_cache, self.tokens, self.samplers = [], [], [], []
        self.logits_processors, self.stop_sequences, self.max_tokens = [], [], []
        return batch


class HeldBatch(GenerationBatch):  # type: ignore[misc]
    """Rows of which some may be constrained; while none is, every step is mlx-lm's own."""

    _current_tokens: mx.array | None
    _current_logprobs: list[mx.array]

    def _step(self) -> tuple[list[int], list[mx.array]]:
        constraints = [_constraint(stops) for stops in self.stop_sequences]
        if not any(constraints):
            return super()._step()  # type: ignore[no-any-return]
        # The first input is the prompt's last token, which no constraint takes.
        is_first = self._current_tokens is None
        inputs = self._current_tokens = self._next_tokens
        self._current_logprobs = self._next_logprobs
        logits, contexts = self._processed(self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :], inputs)
        mx.async_eval(logits, contexts)  # type: ignore[no-untyped-call]
        mx.eval(inputs, self._current_logprobs)
        tokens = inputs.tolist()
        for held, token in zip(self.tokens, tokens, strict=True):
            held.append(token)
        if not is_first:
            for constraint, token in zip(constraints, tokens, strict=True):
                if constraint is not None:
                    constraint.accept(token)
        mask = row_masks(constraints, logits.shape[-1])
        self._sample(logits if mask is None else masked(logits, mask))
        return tokens, self._current_logprobs

    def _processed(self, logits: mx.array, inputs: mx.array) -> tuple[mx.array, list[mx.array]]:
        """Logits `[rows, vocab]` after each row's penalties and biases, and the contexts that those read."""
        if not any(self.logits_processors):
            return logits, []
        rows, contexts = [], []
        for i, processors in enumerate(self.logits_processors):
            row = logits[i : i + 1]
            if processors:
                contexts.append(self._token_context[i].update_and_fetch(inputs[i : i + 1]))
                for process in processors:
                    row = process(contexts[-1], row)
            rows.append(row)
        return mx.concatenate(rows, axis=0), contexts

    def _sample(self, logits: mx.array) -> None:
        """Submit the next tokens and their log-probabilities."""
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        samplers = self.samplers or [self.fallback_sampler] * len(self.uids)
        if all(s is samplers[0] for s in samplers):
            sampled = samplers[0](logprobs)
        else:
            sampled = mx.concatenate([s(logprobs[i : i + 1]) for i, s in enumerate(samplers)], axis=0)
        self._next_tokens, self._next_logprobs = sampled, list(logprobs)
        mx.async_eval(self._next_tokens, self._next_logprobs)  # type: ignore[no-untyped-call]


def row_masks(constraints: Sequence[RowConstraint | None], vocab_size: int) -> NDArray[np.int32] | None:
    """The bits of each row's allowed tokens, int32 `[rows, ceil(vocab / 32)]`; None where no row is restricted."""
    mask = np.full((len(constraints), num_words(vocab_size)), -1, np.int32)
    restricted = [c.mask(row) for c, row in zip(constraints, mask, strict=True) if c is not None]
    return mask if any(restricted) else None


def masked(logits: mx.array, mask: NDArray[np.int32]) -> mx.array:
    """Logits `[rows, vocab]` with all but the allowed tokens at -inf.

    An allowed token that a bias had put at -inf (an ignored end token) is lifted to the lowest finite value, so that
    a row keeps a token to draw. Minimum and maximum: MLX's `where` takes four times as long on a CPU.
    """
    bits = (mx.array(mask)[:, :, None] & mx.array(_BITS)) != 0
    allowed = bits.reshape(len(mask), -1)[:, : logits.shape[-1]]
    ceiling = (allowed.astype(logits.dtype) - 0.5) * float("inf")
    return mx.minimum(mx.maximum(logits, mx.finfo(logits.dtype).min), ceiling)


def _constraint(stops: Any) -> RowConstraint | None:
    constraint: RowConstraint | None = getattr(stops, "constraint", None)
    return None if constraint is None or constraint.is_over else constraint
