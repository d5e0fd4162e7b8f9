"""What the settings ask of a codec, what a stored one has, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.config import ServerConfig

# Settings of kv_cache that shape a codec; one of them that the user has not written is no wish.
SHAPING = (
    "key_bits", "value_bits", "transform", "codebooks_per_head", "allocation", "window", "num_sink_tokens",
    "bucket_len",
)  # fmt: skip
# Values that leave the choice to the fit.
_ANY = (None, "auto")


def wanted_of_codec(config: ServerConfig) -> dict[str, Any]:
    """What a codec that is fitted now would have, by the settings' names in kv_cache."""
    return {name: value for name in SHAPING if (value := getattr(config.kv_cache, name)) not in _ANY}


def asked_of_codec(config: ServerConfig) -> dict[str, Any]:
    """Of those, what the user has written."""
    given = config.kv_cache.model_fields_set
    return {name: value for name, value in wanted_of_codec(config).items() if name in given}


def served_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings a codec was fitted with, as far as its manifest's `info` and window say."""
    return {name: facts[name] for name in SHAPING if name in facts}


def agreement_line(config: ServerConfig, facts: Mapping[str, Any]) -> str:
    """Each setting as the served codec has it, with what the settings say where that is something else.

    Args:
        facts: of the manifest's `info` and window; empty: nothing is packed yet.
    """
    asked, served = wanted_of_codec(config), served_settings(facts)
    parts = [
        f"{name} {value}" + (f" (settings: {asked[name]})" if asked.get(name, value) != value else "")
        for name, value in served.items()
    ]
    wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
    return f"codec served: {', '.join(parts)}" if served else f"codec asked for: {wanted}; none is served now"


def disagreements(asked: Mapping[str, Any], info: Mapping[str, Any], window: Mapping[str, int]) -> list[str]:
    """What a codec has otherwise than asked, a phrase each: "key_bits 2, not 4"; empty: it agrees.

    A codec with more bits than were asked for, because those did not pass the gate, agrees with what was asked.
    """
    served = served_settings({**info, **window})
    wished_for: Mapping[str, Any] = info.get("asked") or {}
    return [
        f"{name} {served[name]}, not {value}"
        for name, value in asked.items()
        if name in served and value not in (served[name], wished_for.get(name))
    ]
