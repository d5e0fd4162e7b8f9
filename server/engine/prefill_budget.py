"""How much prompt goes into a step: as much as nobody is hurt by."""

from __future__ import annotations

from collections import deque
from itertools import combinations
from statistics import median
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
WEIGHT = 0.5
# Of a step's time, what its prompts or their tokens have at least, whatever the estimates of the rest say.
LEAST_PART = 0.1
# Steps that are remembered; the last of them tell a token's time. Two are compared if one read so much more.
MAX_STEPS, LAST_STEPS = 12, 3
DIFFERENT = 4
MIN_SLOPES = 3
# While rows decode a step is at most so much larger than one that lasted no longer than it may, and lasts at most so
# many targets where the fixed part leaves no room.
GROWTH = 1.5
LONGEST = 2


class PrefillBudget:
    """Prompt tokens per step, padding and all rows together.

    A step's time is that of decoding, a fixed part (on a GPU the host's, which submits as many kernels for 32 tokens as
    for 2,048), and a time per token. Decoding is measured by the steps without prompts; the other two by the last steps
    with prompts, as far as these read differently much. Medians, since what else the machine does makes steps slow. A
    token costs more with every token of history, so the estimates follow.

    Args:
        max_tokens: of a step, whatever it takes.
        first_tokens: while rows decode and nothing is known.
        target_s: a step's time while rows decode.
    """

    def __init__(self, max_tokens: int, first_tokens: int, target_s: float) -> None:
        self.max_tokens = max_tokens
        self._first_tokens = min(first_tokens, max_tokens)
        self._target_s = target_s
        self._decode_s = self._fixed_s = 0.0
        self._token_s: float | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=MAX_STEPS)

    def tokens(self, *, decoding: bool) -> int:
        """The budget of the next step: what fits the target, and more if the fixed part would be over half of it.

        A smaller step would hardly be shorter then, and there would be many more of them. While rows decode nothing is
        taken on trust: a wrong fixed part makes a token look cheap, so a step grows only from one that kept within.
        """
        if self._token_s is None:
            return self._first_tokens if decoding else self.max_tokens
        left = max(self._target_s - self._decode_s, LEAST_SHARE * self._target_s) if decoding else READ_STEP_S
        if self._fixed_s > left / 2:
            left = min(2 * self._fixed_s, LONGEST * left)
        wanted = max(left - self._fixed_s, 0.0) / self._token_s
        if decoding:
            proven = [n for n, s in self._steps if s <= left] or [min(n for n, _ in self._steps)]
            wanted = min(wanted, GROWTH * max(proven))
        wanted = int(wanted) // GRAIN * GRAIN
        return max(min(MIN_TOKENS, self.max_tokens), min(wanted, self.max_tokens))

    @property
    def fixed_tokens(self) -> int:
        """The fixed part in tokens: what reading in one step instead of two spares."""
        return 0 if self._token_s is None else min(self.max_tokens, int(self._fixed_s / self._token_s))

    def took(self, seconds: float, num_tokens: int, *, decoding: bool) -> None:
        """A step with so many prompt tokens took so long; `decoding`: rows decoded in it too."""
        if num_tokens == 0:
            self._decode_s += WEIGHT * (seconds - self._decode_s)
            return
        read_s = max(seconds - (self._decode_s if decoding else 0.0), LEAST_PART * seconds)
        self._steps.append((num_tokens, read_s))
        slopes = [(s - t) / (n - m) for (m, t), (n, s) in combinations(sorted(self._steps), 2) if n >= DIFFERENT * m]
        if len(slopes) >= MIN_SLOPES:
            # Theil-Sen: the median of the slopes through two steps each.
            slope = max(0.0, median(slopes))
            self._fixed_s = max(0.0, min(median(s - slope * n for n, s in self._steps), *(s for _, s in self._steps)))
        recent = list(self._steps)[-LAST_STEPS:]
        large = [(n, s) for n, s in recent if 2 * n >= max(n for n, _ in recent)]
        self._token_s = median(max(s - self._fixed_s, LEAST_PART * s) / n for n, s in large)


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
