"""What the settings ask for and what is served agree: the artifact a start chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant_core.artifact.store import ArtifactStore
from quant_core.codec.spec import WindowSpec
from quant_core.proof.random_codec import random_codec
from server.calibration.choice import choose_codec, fitting_command
from server.calibration.options import JobOptions
from server.config import ServerConfig, load_config, override
from server.errors import ConfigError

MODEL = "model-1"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def put(store: ArtifactStore, bits: int, window: int = 64, **info: Any) -> str:
    """A stored codec with these facts in its manifest."""
    codec = random_codec(2, bits, 64, seed=bits + window, window=WindowSpec(window))
    facts = {"key_bits": bits, "value_bits": bits, "transform": "auto", "allocation": "uniform", **info}
    codec.info.update(facts)
    return store.put(codec, {}, MODEL)


def config(**kv: Any) -> ServerConfig:
    return ServerConfig.model_validate({"kv_cache": kv})


def chosen(store: ArtifactStore, settings: ServerConfig) -> str | None:
    codec = choose_codec(settings, store, MODEL).codec
    return None if codec is None else codec.artifact_id


def test_what_was_activated_is_served_until_a_setting_says_otherwise(store: ArtifactStore) -> None:
    two, four = put(store, 2), put(store, 4)
    store.set_active(MODEL, four)
    assert chosen(store, config()) == four
    assert chosen(store, config(key_bits=2, value_bits=2)) == two
    assert chosen(store, override(ServerConfig(), {"kv_cache.key_bits": 4, "http.port": 1})) == four
    assert chosen(store, override(ServerConfig(), {"kv_cache.key_bits": 2, "kv_cache.value_bits": 2})) == two


@pytest.mark.parametrize(
    "kv",
    [{"key_bits": 4, "value_bits": 4}, {"window": 128}, {"bucket_len": 1024}, {"num_sink_tokens": 0},
     {"transform": "learned"}, {"allocation": "measured"}, {"codebooks_per_head": 1}],
    ids=str,
)  # fmt: skip
def test_no_setting_is_ignored(store: ArtifactStore, kv: dict[str, Any]) -> None:
    two = put(store, 2, codebooks_per_head=4)
    store.set_active(MODEL, two)
    found = choose_codec(config(**kv), store, MODEL)
    (name, value), *_ = kv.items()
    assert found.codec is None and f"{name} " in found.reason and f"not {value}" in found.reason


def test_auto_and_null_leave_the_choice(store: ArtifactStore) -> None:
    learned = put(store, 2, transform="learned", codebooks_per_head=2)
    store.set_active(MODEL, learned)
    assert chosen(store, config(transform="auto", codebooks_per_head=None)) == learned


def test_an_experiment_that_was_not_activated_is_left_alone(store: ArtifactStore) -> None:
    put(store, 4)
    assert chosen(store, config()) is None
    assert chosen(store, config(key_bits=4, value_bits=4)) is not None


def test_more_bits_than_asked_because_the_gate_refused_fewer_agree(store: ArtifactStore) -> None:
    raised = JobOptions(key_bits=2, value_bits=2).raised()
    assert raised is not None and (raised.key_bits, raised.value_bits) == (3, 3)
    three = put(store, 3, **raised.info())
    store.set_active(MODEL, three)
    assert chosen(store, config(key_bits=2, value_bits=2)) == three
    more = raised.raised()
    assert more is not None and more.asked_bits == (2, 2) and more.raised() is None


def test_a_damaged_active_one_gives_way_to_another_that_agrees(store: ArtifactStore, tmp_path: Path) -> None:
    two, other = put(store, 2), put(store, 2, num_tokens=5, seed=9)
    assert two == other
    third = put(store, 2, window=72)
    store.set_active(MODEL, third)
    (tmp_path / third / "codec.safetensors").write_bytes(b"gone")
    assert chosen(store, config()) == two


def test_a_named_artifact_wins_over_defaults_and_not_over_a_changed_setting(
    store: ArtifactStore, tmp_path: Path
) -> None:
    four = put(store, 4)
    whole = load_config(Path(__file__).parents[3] / "config.yaml")
    assert chosen(store, override(whole, {"kv_cache.artifact": four})) == four
    with pytest.raises(ConfigError, match=r"key_bits 4, not 3.*kv_cache\.key_bits"):
        choose_codec(config(artifact=four, key_bits=3), store, MODEL)


@pytest.mark.parametrize("kv", [{"bucket_len": 100}, {"window": 20}, {"window": 8}], ids=str)
def test_windows_that_no_codec_has_are_refused_at_once(kv: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(kv))):
        override(ServerConfig(), {f"kv_cache.{name}": value for name, value in kv.items()})


def test_the_command_names_what_is_asked_for() -> None:
    asked = ServerConfig.model_validate(
        {
            "model": {"name": "a model"},
            "kv_cache": {"key_bits": 4, "window": 128, "transform": "auto", "pool_bytes": 10**9},
            "calibration": {"max_kl": 0.5, "num_samples": 8, "refine": "off"},
        }
    )
    assert fitting_command(asked, Path("/data")) == (
        "vecinfer calibrate --local --model 'a model' --data-dir /data "
        "--key-bits 4 --window 128 --samples 8 --max-kl 0.5 --activate"
    )
