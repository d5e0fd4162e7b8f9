"""One calibration's options: their defaults, their settings, and their names in JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from quant_core.calibrate.options import CalibrationOptions
from server.calibration.options import SETTINGS, WIRE_NAMES, JobOptions, configured_options
from server.config import ServerConfig, override
from server.http.schemas.calibration import CalibrationBody

OTHER: dict[str, Any] = {
    "key_bits": 4, "value_bits": 3, "transform": "learned", "codebooks_per_head": 2, "allocation": "measured",
    "preset": "thorough", "num_samples": 12, "sample_len": 333, "seed": 7, "max_kl": 0.5,
}  # fmt: skip


def test_a_default_configuration_is_the_default_options() -> None:
    assert configured_options(ServerConfig()) == JobOptions()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_reaches_its_option(name: str) -> None:
    config = override(ServerConfig(), {SETTINGS[name]: OTHER[name]})
    assert configured_options(config) == dataclasses.replace(JobOptions(), **{name: OTHER[name]})


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_may_be_given_in_a_request_and_is_shown(name: str) -> None:
    wire = WIRE_NAMES.get(name, name)
    options = CalibrationBody.model_validate({wire: OTHER[name]}).options(ServerConfig(), ())
    assert options == dataclasses.replace(JobOptions(), **{name: OTHER[name]})
    assert options.to_wire()[wire] == OTHER[name]


def test_the_windows_of_the_configuration_reach_the_codec() -> None:
    changes = {"kv_cache.window": 128, "kv_cache.num_sink_tokens": 2, "kv_cache.bucket_len": 256}
    window = configured_options(override(ServerConfig(), changes)).window
    assert (window.window, window.num_sink_tokens, window.bucket_len) == (128, 2, 256)


def test_only_options_of_the_library_alone_have_no_setting() -> None:
    fields = {f.name for f in dataclasses.fields(CalibrationOptions)}
    assert fields - set(SETTINGS) == {"window", "gradient_tokens", "tuning_tokens"}
