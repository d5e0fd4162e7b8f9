"""Whether a model on this disk fits this machine: an estimate before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from quant_core.codec.spec import WindowSpec
from quant_core.errors import QuantError
from server.errors import ModelError
from server.memory.budget import WORKSPACE_BYTES, working_set_bytes
from server.memory.estimate import fp16_plan, model_shape, packed_plan
from server.system.json_file import read_object

CONVERSATION_LEN = 8192
_BITS = 2


@dataclass(frozen=True)
class Fit:
    """What a model would leave.

    Attributes:
        weight_bytes: in memory; on a CPU as float32.
        left_bytes: for conversations; negative: even the weights are too large.
        num_conversations: packed ones of CONVERSATION_LEN tokens that this holds; None: the shape is not known.
    """

    weight_bytes: int
    left_bytes: int
    num_conversations: int | None

    @property
    def fits(self) -> bool:
        """Whether weights and one conversation find room."""
        return self.left_bytes > 0 and self.num_conversations != 0

    def __str__(self) -> str:
        if not self.fits:
            return "does not fit"
        if self.num_conversations is None:
            return "fits"
        return f"fits, with {min(self.num_conversations, 999)} conversations of {CONVERSATION_LEN // 1024}k tokens"


def fit_of(folder: Path, file_bytes: int, room_bytes: int | None = None) -> Fit:
    """The fit of the model in `folder`.

    Args:
        file_bytes: of its weight files.
        room_bytes: for weights and caches together; None: what the server would give them here, now.
    """
    weights = loaded_bytes(folder, file_bytes)
    room = working_set_bytes() if room_bytes is None else room_bytes
    left = room - weights - WORKSPACE_BYTES
    try:
        shape = model_shape(str(folder))
        try:
            plan = packed_plan(shape, _BITS, _BITS, WindowSpec())
        except QuantError:  # heads that no codec has
            plan = fp16_plan(shape)
    except (ModelError, ValueError, TypeError):
        return Fit(weights, left, None)
    return Fit(weights, left, max(0, int(left / plan.bytes_at(CONVERSATION_LEN))))


def loaded_bytes(folder: Path, file_bytes: int) -> int:
    """Bytes of the weights once loaded: as in the files, on a CPU dequantised to float32."""
    if mx.default_device() != mx.Device(mx.cpu):
        return file_bytes
    try:
        config = read_object(folder / "config.json")
        quantised = config.get("quantization") or {}
        whole = 32.0 if config.get("dtype", config.get("torch_dtype")) == "float32" else 16.0
        # A scale and a bias of 16 bits for every group of weights.
        bits = quantised["bits"] + 32 / quantised.get("group_size", 64) if quantised else whole
        return int(file_bytes * 32 / max(bits, 1.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return 2 * file_bytes
