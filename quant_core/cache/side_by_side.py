"""Which models can run rows side by side: read prompts of different lengths, and generate.

mlx-lm pads prompts; some recurrent layers read the padding. A few models answer wrongly, or not at all, in any batch.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

_LENGTHS = (3, 12)
# Relative difference that rounding may make in any case; more where rows without padding differ by more than a quarter.
_ROUNDING = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 5e-3}


# Architectures of mlx-lm 0.32 that are right with one row at a time only; docs/models.md and its tests find them.
ONE_ROW = {
    "afm7": "the padding of a batch changes its answers",
    "gpt_bigcode": "it takes the positions of all rows for one number",
    "longcat_flash_ngram": "the caches of its n-grams cannot be joined",
    "phi3small": "its blocks of attention count the padding of a batch",
}


def why_one_row(model: Any) -> str:
    """Why this model cannot generate for several rows side by side; empty where it can."""
    return ONE_ROW.get(str(getattr(model, "model_type", "")), "")


def reads_side_by_side(model: Any) -> bool:
    """Whether two short prompts of different lengths read at once leave what each leaves alone. MLX thread only.

    Caches of attention mask the padding, so models of nothing else are not asked.
    """
    if all(type(c) in (KVCache, RotatingKVCache) for c in make_prompt_cache(model)):
        return True
    short, long = ([(7 * i) % 50 + 1 for i in range(n)] for n in _LENGTHS)
    rounding = max(_apart(model, [prompt, prompt]) for prompt in (short, long))
    limit = max(_ROUNDING.get(model(mx.array([[1]])).dtype, 0.0), 4 * rounding)
    return _apart(model, [short, long]) <= limit


def _apart(model: Any, prompts: list[list[int]]) -> float:
    """How far the first of the prompts, read with the others, is from what it is alone."""
    alone, together = _first_logprobs(model, prompts[:1])[0], _first_logprobs(model, prompts)[0]
    return float(np.linalg.norm(alone - together) / np.linalg.norm(alone))


def _first_logprobs(model: Any, prompts: list[list[int]]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Centred log-probabilities behind each prompt, read at once."""
    generator = BatchGenerator(model, prefill_batch_size=len(prompts))
    generator.close()
    uids = generator.insert(prompts, [1] * len(prompts))
    found = dict[int, np.ndarray[Any, np.dtype[np.float64]]]()
    while len(found) < len(prompts):
        for response in generator.next()[1]:
            logprobs = np.array(response.logprobs.astype(mx.float32), np.float64)
            found[response.uid] = logprobs - logprobs.mean()
    return [found[uid] for uid in uids]
