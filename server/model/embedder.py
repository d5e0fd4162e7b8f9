"""Text embeddings from an mlx-lm model: the last layer's hidden states, pooled and scaled to length 1.

Made for embedding models of decoder architectures (Qwen3-Embedding and its like); any served model can be used too, but
serves search less well. How the states are pooled is read from the folder's `1_Pooling/config.json`, which
sentence-transformers writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from server.errors import ModelError
from server.model.loader import LoadedModel
from server.system.json_file import read_object

Pooling = Literal["mean", "last", "first"]

# Tokens read between two decode steps of the chats.
PIECE_LEN_GPU = 512
PIECE_LEN_CPU = 64
_POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
}


class Embedder:
    """One model that makes embeddings.

    Args:
        loaded: the model, its tokenizer and folder.
        name: what callers name it by, besides its id.

    Raises:
        ModelError: the architecture does not give its hidden states.
    """

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.names = tuple(dict.fromkeys((loaded.model_id, name)))
        self.tokenizer = loaded.tokenizer
        self.context_len = loaded.context_len
        self.pooling = read_pooling(loaded.path)
        self.model = loaded.model
        self._inner = _hidden_states_of(loaded.model)

    def ids(self, text: str) -> tuple[int, ...]:
        """The text's token ids, with the special tokens that the model expects around a text."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=True))

    def start(self, ids: tuple[int, ...]) -> EmbeddingRun:
        """Begin with a text; nothing is computed yet."""
        return EmbeddingRun(self._inner, make_prompt_cache(self.model), ids, self.pooling)


class EmbeddingRun:
    """One text being embedded, a piece between two steps. MLX thread only.

    Args:
        inner: token ids `[1, T]` and caches -> hidden states `[1, T, D]`.
        caches: empty, one per layer.
        ids: the text.
    """

    def __init__(self, inner: Any, caches: list[Any], ids: tuple[int, ...], pooling: Pooling) -> None:
        self._inner = inner
        self._caches = caches
        self._ids = ids
        self._pooling = pooling
        self._num_read = 0
        self._pooled: mx.array | None = None

    def advance(self) -> list[float] | None:
        """Read the next piece; the embedding `[D]`, of length 1, after the last one, else None."""
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        piece = self._ids[self._num_read : self._num_read + (PIECE_LEN_CPU if on_cpu else PIECE_LEN_GPU)]
        states = self._inner(mx.array([piece]), cache=self._caches)[0].astype(mx.float32)
        self._take(states)
        self._num_read += len(piece)
        mx.eval(self._pooled, [c.state for c in self._caches])
        if self._num_read < len(self._ids):
            return None
        vector = np.array(self._pooled, np.float32)
        norm = float(np.linalg.norm(vector))
        return [float(x) for x in vector / (norm or 1.0)]

    def _take(self, states: mx.array) -> None:
        if self._pooling == "mean":
            total = states.sum(axis=0)
            self._pooled = total if self._pooled is None else self._pooled + total
        elif self._pooling == "last":
            self._pooled = states[-1]
        elif self._pooled is None:
            self._pooled = states[0]


def read_pooling(folder: Path) -> Pooling:
    """How the model's makers pool its states; the mean where the folder does not say."""
    try:
        config = read_object(folder / "1_Pooling" / "config.json")
    except (OSError, ValueError):
        return "mean"
    return next((pooling for key, pooling in _POOLING_KEYS.items() if config.get(key) is True), "mean")


def _hidden_states_of(model: Any) -> Any:
    """The part of the model before its output layer."""
    inner = getattr(getattr(model, "language_model", model), "model", None)
    found = None
    if inner is not None:
        try:
            found = inner(mx.array([[0]]), cache=make_prompt_cache(model))
        except TypeError:
            found = None
    if not isinstance(found, mx.array) or found.ndim != 3:
        raise ModelError("model.embedding_model: this architecture does not give its hidden states; choose another")
    return inner
