"""A better codec is looked for while nobody asks for anything, and only then."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from quant_core.artifact.store import ArtifactStore, model_fingerprint
from quant_core.calibrate.presets import Preset
from quant_core.proof.random_codec import random_codec
from server.calibration import refinement
from server.calibration.refinement import OutOfTime, WorkTime
from server.config import ServerConfig
from tests.helpers.tiny_models import build_tiny_model
from tests.server.serving.conftest import Service, serving, tiny_server

AT_ONCE = {"refine_after_s": 0.0, "refine_share": 1.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of seconds."""
    sizes = Preset(num_samples=8, sample_len=192, gradient_tokens=0)
    monkeypatch.setattr(refinement, "preset", lambda name: sizes)
    monkeypatch.setattr("quant_core.calibrate.presets._CPU", {"default": sizes, "thorough": sizes})
    monkeypatch.setattr(refinement, "reason_to_wait", lambda: "")
    monkeypatch.setattr("server.calibration.refiner.reason_to_wait", lambda: "")


def with_a_poor_codec(folder: Path, builtin_text: bool, **calibration: Any) -> tuple[ServerConfig, str]:
    """A server whose active codec was not fitted at all, and that codec's id."""
    config = tiny_server(folder, calibration={**AT_ONCE, **calibration})
    fingerprint = model_fingerprint(build_tiny_model("llama", num_hidden_layers=1))
    codec = random_codec(1, 2, 64)
    codec.info.update(key_bits=1, value_bits=1, transform="smooth_hadamard", builtin_text=builtin_text)
    store = ArtifactStore(folder / "data" / "artifacts")
    artifact_id = store.put(codec, {}, fingerprint)
    store.set_active(fingerprint, artifact_id)
    return config, artifact_id


def refined(server: Service) -> dict[str, Any]:
    found: dict[str, Any] = server.status()["refinement"]
    return found


@pytest.mark.usefixtures("small")
def test_a_better_codec_takes_over_and_chats_go_on(folder: Path) -> None:
    config, poor = with_a_poor_codec(folder, builtin_text=True)
    with serving(config) as server:
        server.wait(lambda: refined(server)["state"] == "working")
        assert server.chat()["usage"]["completion_tokens"] == 8
        server.wait(lambda: refined(server)["kl_after"] is not None)
        status = server.status()
        assert status["refinement"]["kl_after"] < 0.9 * status["refinement"]["kl_before"]
        assert status["active_artifact"] != poor and status["packing"]["state"] == "packed"
        better = server.client.get(f"/admin/artifacts/{status['active_artifact']}").json()
        assert better["info"]["builtin_text"] is True and better["info"]["refined_s"] >= 0
        assert server.chat()["usage"]["completion_tokens"] == 8


@pytest.mark.usefixtures("small")
def test_a_codec_of_the_users_own_text_is_left_alone(folder: Path) -> None:
    config, own = with_a_poor_codec(folder, builtin_text=False)
    with serving(config) as server:
        server.wait(lambda: "texts of the user's" in refined(server)["detail"])
        server.chat()
        assert server.status()["active_artifact"] == own


@pytest.mark.usefixtures("small")
def test_it_ends_when_its_time_is_used_up(folder: Path) -> None:
    config, poor = with_a_poor_codec(folder, builtin_text=True, refine_minutes=0.001)
    with serving(config) as server:
        server.wait(lambda: refined(server)["state"] == "done")
        assert "refine_minutes (0.001)" in refined(server)["detail"] and refined(server)["spent_s"] < 10
        assert server.status()["active_artifact"] == poor


def test_off_means_off(folder: Path) -> None:
    config, _ = with_a_poor_codec(folder, builtin_text=True, refine=False)
    assert config.calibration.refine == "off"
    with serving(config) as server:
        assert server.status()["refinement"] is None


def test_time_counts_in_slices_only() -> None:
    work, now = WorkTime(0.02), 0

    def endless() -> Any:
        nonlocal now
        while True:
            now += 1
            time.sleep(0.005)
            yield now

    slices = work.timed(endless())
    next(slices)
    time.sleep(0.05)
    assert work.spent_s < 0.03
    with pytest.raises(OutOfTime):
        for _ in range(20):
            next(slices)
    assert now < 20
