"""Log-probabilities of prompts, from the forward passes that read them anyway."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from server.engine.answer_text import token_logprobs
from server.engine.detokenizer import Vocabulary
from server.engine.request import GenerationRequest, PromptLogprobsEvent, TokenLogprob

# Positions read at once while a prompt is scored, and looked at at once: logits are wide.
MAX_SCORED_TOKENS = 64
PIECE_TOKENS = 32


class PromptScores:
    """What is known of one prompt that is read from its beginning."""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._num_top = request.sampling.prompt_logprobs or 0
        self._entries: list[tuple[TokenLogprob, ...] | None] = [None]

    @property
    def is_complete(self) -> bool:
        """Whether every token but the last was read; nothing in the prompt follows that one."""
        return len(self._entries) == len(self._request.prompt)

    @property
    def event(self) -> PromptLogprobsEvent:
        """The log-probabilities of every prompt token, once `is_complete`."""
        texts = tuple(self._vocabulary.token_text(t) for t in self._request.prompt)
        return PromptLogprobsEvent(self._request.request_id, texts, tuple(self._entries))

    def add(self, logits: mx.array, num_read: int) -> None:
        """Take the logits `[T, vocab]` of the next positions, padding behind them; `num_read` tokens are read now."""
        first = len(self._entries) - 1
        followers = self._request.prompt[first + 1 : num_read + 1]
        for at in range(0, len(followers), PIECE_TOKENS):
            ids = followers[at : at + PIECE_TOKENS]
            piece = logits[at : at + len(ids)].astype(mx.float32)
            logprobs = np.array(piece - mx.logsumexp(piece, axis=-1, keepdims=True))
            for token_id, row in zip(ids, logprobs, strict=True):
                self._entries.append(token_logprobs(self._vocabulary, token_id, row, self._num_top))


class ScoringModel:
    """The model as a BatchGenerator calls it; the logits of prompts that are to be scored are looked at in passing.

    Attributes:
        generator: whose prompt batch is meant.
        scores: by row.
    """

    def __init__(self, model: Any) -> None:
        self.generator: Any = None
        self.scores: dict[int, PromptScores] = {}
        self._model = model

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        """Logits `[B, T, vocab]` of tokens `[B, T]`."""
        logits: mx.array = self._model(tokens, cache=cache)
        batch = self.generator._prompt_batch
        if self.scores and cache is batch.prompt_cache:
            for row, (uid, held) in enumerate(zip(batch.uids, batch.tokens, strict=True)):
                if uid in self.scores:
                    self.scores[uid].add(logits[row], len(held))
        return logits
