"""What a calibration job may be told, and where the configuration has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from quant_core.calibrate.options import CalibrationOptions
from quant_core.codec.spec import LEGAL_BITS, WindowSpec
from server.config import ServerConfig

# Options that a request or a command line may give, and the setting each of them otherwise comes from.
SETTINGS = {
    "key_bits": "kv_cache.key_bits",
    "value_bits": "kv_cache.value_bits",
    "transform": "kv_cache.transform",
    "codebooks_per_head": "kv_cache.codebooks_per_head",
    "allocation": "kv_cache.allocation",
    "preset": "calibration.preset",
    "num_samples": "calibration.num_samples",
    "sample_len": "calibration.sample_len",
    "seed": "calibration.seed",
    "max_kl": "calibration.max_kl",
}
# Options of a command line that fits without a server: a running one has the windows that its conversations have.
WINDOW_SETTINGS = {name: f"kv_cache.{name}" for name in ("window", "num_sink_tokens", "bucket_len")}
# One of them has another name in JSON.
WIRE_NAMES = {"num_samples": "samples"}


@dataclass(frozen=True)
class JobOptions(CalibrationOptions):
    """How to calibrate, on what, and whether the result is used at once.

    Attributes:
        texts: to fit on.
        builtin: fit on the model's own continuations of built-in prompts too, where the texts are short.
        activate: new conversations use the codec as soon as it is stored.
        asked_bits: of keys and values, where the gate refused a codec with fewer bits than these options have.
    """

    texts: tuple[str, ...] = ()
    builtin: bool = True
    activate: bool = False
    asked_bits: tuple[int, int] | None = None

    def raised(self) -> JobOptions | None:
        """The next higher bits, for when the gate refused a codec; None: there are none."""
        if min(self.key_bits, self.value_bits) == LEGAL_BITS[-1]:
            return None
        key_bits, value_bits = (min(bits + 1, LEGAL_BITS[-1]) for bits in (self.key_bits, self.value_bits))
        asked = self.asked_bits or (self.key_bits, self.value_bits)
        return replace(self, key_bits=key_bits, value_bits=value_bits, asked_bits=asked)

    def info(self) -> dict[str, Any]:
        """What the manifest is to say besides."""
        found: dict[str, Any] = {"builtin_text": self.builtin and not self.texts}
        if self.asked_bits is not None:
            found["asked"] = {"key_bits": self.asked_bits[0], "value_bits": self.asked_bits[1]}
        return found

    def to_wire(self) -> dict[str, Any]:
        """The options without the texts, which may be megabytes."""
        options = {WIRE_NAMES.get(name, name): getattr(self, name) for name in SETTINGS}
        return {**options, "activate": self.activate, "builtin": self.builtin, "num_texts": len(self.texts)}


def configured_options(config: ServerConfig) -> JobOptions:
    """The options as config.yaml has them, without its text."""
    kv = config.kv_cache
    options = {name: attrgetter(setting)(config) for name, setting in SETTINGS.items()}
    return JobOptions(**options, window=WindowSpec(kv.window, kv.num_sink_tokens, kv.bucket_len))
