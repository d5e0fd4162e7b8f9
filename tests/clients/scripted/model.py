"""A model of mlx-lm's interface whose logits are scripted; cache, batching, sampling and masks stay real.

Its keys are the token ids themselves, so that each row's whole text is read back from the batch's own cache, whoever
merged, forked, trimmed or resumed it. The text decides the script (`scripts.py`), the script the next token. Where a
mask or a forced token leads away from the script, the likeliest tokens lead back, then come those that end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.clients.scripted.scripts import answer_to, continuation

ASSISTANT = "<|im_start|>assistant\n"
END_TOKEN = "<|im_end|>"
END_OF_THOUGHT = "</think>"
SCRIPTED, TOWARDS, END, CLOSING = 80.0, 60.0, 40.0, 30.0
# How far ahead a token that leads back to the script may reach.
MAX_TOKEN_CHARS = 24
CLOSERS = ('"', "}", "]", '"}', '"]', "}}", "0", "a", ":", ",", "</", ">")


@dataclass
class ModelArgs:
    """What config.json says."""

    vocab_size: int
    tokenizer_file: str
    thinks: bool

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        return cls(config["vocab_size"], config["tokenizer_file"], config["thinks"])


class Model(nn.Module):  # type: ignore[misc]
    """One layer that only remembers."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.vocab_size = args.vocab_size
        self.weight = mx.zeros((1,))
        self._script = Script(args)

    @property
    def layers(self) -> list[nn.Module]:
        return [self]

    def make_cache(self) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Logits `[B, T, V]`; only a single token's are scripted, those of a prompt chunk are flat."""
        batch, length = tokens.shape
        ids = mx.broadcast_to(tokens.astype(mx.float32)[:, None, :, None], (batch, 1, length, 4))
        held = (cache or self.make_cache())[0]
        keys, _ = held.update_and_fetch(ids, ids)
        if length > 1:
            # Tied to the keys, as a real model's logits are, so that evaluating one fills the cache.
            return mx.broadcast_to(0 * keys[:, 0, -length:, :1], (batch, length, self.vocab_size))
        rows = np.array(keys[:, 0, :, 0]).astype(np.int64)
        padding: Any = getattr(held, "left_padding", mx.zeros((batch,), mx.int32)).tolist()
        logits = np.stack([self._script.logits(row[pad:]) for row, pad in zip(rows, padding, strict=True)])
        return mx.array(logits)[:, None, :]


class Script:
    """From a row's token ids to its next logits."""

    def __init__(self, args: ModelArgs) -> None:
        self._tokenizer = Tokenizer.from_file(args.tokenizer_file)
        self._thinks = args.thinks
        texts = [self._decode([i]) for i in range(self._tokenizer.get_vocab_size())]
        self._token_of = {text: index for index, text in reversed(list(enumerate(texts)))}
        self._end: Any = self._tokenizer.token_to_id(END_TOKEN)
        self._mark = np.array(self._encode(ASSISTANT))
        self._base = np.linspace(0.0, -1e-3, args.vocab_size, dtype=np.float32)
        for closer in CLOSERS:
            self._base[self._token_of[closer]] += CLOSING
        self._base[self._end] += END
        self._answer = lru_cache(maxsize=256)(self._make_answer)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """`[V]` float32 after `ids`."""
        start = self._answer_start(ids)
        if start is None:
            text = continuation(self._decode(ids.tolist()))
            return self._towards(text, self._encode(text)[0] if text else self._end)
        text, tokens = self._answer(ids[:start].tobytes())
        said = ids[start:].tolist()
        if said == list(tokens[: len(said)]):
            return self._towards(text[len(self._decode(said)) :], tokens[min(len(said), len(tokens) - 1)])
        text = rest_of(text, self._decode(said))
        return self._towards(text, self._encode(text)[0] if text else self._end)

    def _towards(self, text: str, token: int) -> NDArray[np.float32]:
        """Logits whose likeliest token is `token`, and then those that begin `text`, long ones first."""
        logits = self._base.copy()
        for rest in (text, text.lstrip(), text.rpartition(END_OF_THOUGHT)[2].lstrip()):
            for length in range(1, min(len(rest), MAX_TOKEN_CHARS) + 1):
                if (other := self._token_of.get(rest[:length])) is not None:
                    logits[other] = max(logits[other], TOWARDS + 0.1 * length)
        logits[token] = SCRIPTED
        return logits

    def _answer_start(self, ids: NDArray[np.int64]) -> int | None:
        """Where the assistant's last turn begins; None for a plain text."""
        for start in np.flatnonzero(ids == self._mark[0])[::-1]:
            if np.array_equal(ids[start : start + len(self._mark)], self._mark):
                return int(start) + len(self._mark)
        return None

    def _make_answer(self, prompt: bytes) -> tuple[str, tuple[int, ...]]:
        text = answer_to(self._decode(np.frombuffer(prompt, np.int64).tolist()), thinks=self._thinks)
        return text, (*self._encode(text), self._end)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def rest_of(script: str, said: str) -> str:
    """What is left of a script after an answer that may differ in white space, or thought less than it should have."""
    if END_OF_THOUGHT in said or not said.lstrip().startswith("<"):
        script, said = script.rpartition(END_OF_THOUGHT)[2], said.rpartition(END_OF_THOUGHT)[2]
    place = 0
    for char in "".join(said.split()):
        while place < len(script) and script[place].isspace():
            place += 1
        if place == len(script) or script[place] != char:
            return ""
        place += 1
    return script[place:].lstrip() if said[-1:].isspace() else script[place:]
