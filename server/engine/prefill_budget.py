"""How much prompt goes into a step: as much as nobody is hurt by."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# The longest gap that rows which decode should see while prompts are read; flushes come on top.
TARGET_GAP_GPU_S = 0.15
TARGET_GAP_CPU_S = 0.8
# With nothing decoding: what a request that comes meanwhile waits for at most, since a step is not cut short.
READ_STEP_S = 1.0
# Of the target, what prompts get when decoding alone takes longer.
LEAST_SHARE = 0.5
MIN_TOKENS = 16
GRAIN = 8
# Of a prompt's tokens, what a step reads before anything was measured and while others decode.
FIRST_TOKENS_GPU = 512
FIRST_TOKENS_CPU = 64
MAX_TOKENS_GPU = 8192
MAX_TOKENS_CPU = 512
# A step's activations take this much, or this part of a large device's memory (`WORKSPACE_BYTES` is what is set aside).
ACTIVATION_BYTES = 512 << 20
ACTIVATION_SHARE = 1 / 64
# Arrays of a layer's widest product that live at a time.
WIDE_ARRAYS = 8
# One slow step says little: the machine may have been busy.
MAX_SLOWDOWN = 4.0
WEIGHT = 0.5


class PrefillBudget:
    """Prompt tokens per step, padding and all rows together.

    A step's time is that of decoding plus that of its prompt tokens. Both are measured: decoding by the steps without
    prompts, a token by the steps with many (a step has costs that do not grow with its tokens, so one with few would
    make them look dear). A token costs more with every token of history, so the estimate follows.

    Args:
        max_tokens: of a step, whatever it takes.
        first_tokens: while rows decode and nothing is known.
        target_s: a step's time while rows decode.
    """

    def __init__(self, max_tokens: int, first_tokens: int, target_s: float) -> None:
        self.max_tokens = max_tokens
        self._first_tokens = min(first_tokens, max_tokens)
        self._target_s = target_s
        self._token_s: float | None = None
        self._decode_s = 0.0

    def tokens(self, *, decoding: bool) -> int:
        """The budget of the next step."""
        if self._token_s is None:
            return self._first_tokens if decoding else self.max_tokens
        left = READ_STEP_S
        if decoding:
            left = max(self._target_s - self._decode_s, LEAST_SHARE * self._target_s)
        wanted = int(left / self._token_s) // GRAIN * GRAIN
        return max(min(MIN_TOKENS, self.max_tokens), min(wanted, self.max_tokens))

    def took(self, seconds: float, num_tokens: int, *, decoding: bool) -> None:
        """A step with so many prompt tokens took so long; `decoding`: rows decoded in it too."""
        if num_tokens == 0:
            self._decode_s += WEIGHT * (seconds - self._decode_s)
            return
        token_s = max(seconds - (self._decode_s if decoding else 0.0), 0.1 * seconds) / num_tokens
        if self._token_s is None:
            self._token_s = token_s
        elif token_s < self._token_s:
            self._token_s += WEIGHT * (token_s - self._token_s)
        elif num_tokens >= self.tokens(decoding=decoding) / 2 or seconds > self._target_s:
            self._token_s += WEIGHT * (min(token_s, MAX_SLOWDOWN * self._token_s) - self._token_s)


def prefill_budget(model: Any, max_tokens: int | None, target_gap_ms: float | None) -> PrefillBudget:
    """The budget for a model on this device; what is None follows from them."""
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    target_s = TARGET_GAP_CPU_S if is_cpu else TARGET_GAP_GPU_S
    most = MAX_TOKENS_CPU if is_cpu else min(MAX_TOKENS_GPU, _tokens_in_memory(model))
    return PrefillBudget(
        max_tokens or most,
        FIRST_TOKENS_CPU if is_cpu else FIRST_TOKENS_GPU,
        target_gap_ms / 1e3 if target_gap_ms is not None else target_s,
    )


def _tokens_in_memory(model: Any) -> int:
    """Prompt tokens whose activations fit, a multiple of 512."""
    args = getattr(model, "args", None)
    width = max(int(getattr(args, "intermediate_size", 0) or 0), 4 * int(getattr(args, "hidden_size", 0) or 4096))
    info = mx.device_info()
    memory = int(info.get("max_recommended_working_set_size", 0) or info.get("total_memory", 0) or 0)
    room = max(ACTIVATION_BYTES, int(ACTIVATION_SHARE * memory))
    return max(512, room // (WIDE_ARRAYS * 2 * width) // 512 * 512)
