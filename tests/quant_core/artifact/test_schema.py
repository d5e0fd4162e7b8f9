"""One flipped bit in a manifest: a clean error, never another exception, never another codec than was stored."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from quant_core.artifact.schema import Manifest
from quant_core.artifact.store import ArtifactStore
from quant_core.errors import ArtifactError
from quant_core.proof.random_codec import random_codec

NUM_FLIPS = 4000


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a stored codec."""
    root = tmp_path_factory.mktemp("artifacts")
    report = {"kl_mean": 0.03, "note": "é 漢", "texts": [{"name": "a", "kl": 1.5e-05}]}
    artifact_id = ArtifactStore(root).put(random_codec(2, 2, 64, key_bits=3, seed=1), report, "model-a")
    return root / artifact_id / "manifest.json"


def _flipped(data: bytes, bit: int) -> str | None:
    """The text with one bit turned; None: it is no UTF-8, which the store says itself."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        return changed.decode()
    except UnicodeDecodeError:
        return None


def _bits(data: bytes, num: int | None) -> list[int]:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    every = range(8 * len(data))
    return list(every) if num is None else random.Random(seed).sample(every, num)


@pytest.mark.parametrize("num", [NUM_FLIPS, pytest.param(None, marks=pytest.mark.full)], ids=["some", "all"])
def test_a_flipped_bit_is_found(stored: Path, num: int | None) -> None:
    data = stored.read_bytes()
    texts = [text for bit in _bits(data, num) if (text := _flipped(data, bit)) is not None]
    assert len(texts) > NUM_FLIPS // 2
    written = Manifest.from_json(data.decode(), "here")
    num_same = 0
    for text in texts:
        try:
            manifest = Manifest.from_json(text, "here")
        except ArtifactError as error:
            assert "corrupted" in str(error) or "format version" in str(error)
        else:  # an e that became E, the last digit of a number beyond its precision
            assert manifest == written
            num_same += 1
    assert num_same <= 10


@pytest.mark.parametrize("num", [NUM_FLIPS, pytest.param(None, marks=pytest.mark.full)], ids=["some", "all"])
def test_a_flipped_bit_in_a_manifest_of_version_0_1_gives_a_clean_error_or_a_manifest_json_can_hold(
    stored: Path, num: int | None
) -> None:
    earlier = json.loads(stored.read_text())
    del earlier["checksums"]["manifest.json"]
    data = json.dumps(earlier, indent=1, sort_keys=True).encode()
    num_refused = 0
    for text in (_flipped(data, bit) for bit in _bits(data, num)):
        try:
            manifest = Manifest.from_json(text or "", "here")
        except ArtifactError:
            num_refused += 1
        else:
            json.dumps(manifest.model_dump(), allow_nan=False, ensure_ascii=False).encode()
    assert num_refused > NUM_FLIPS // 2


@pytest.mark.parametrize("frequency", ["0x1.0p+2000", "0x1.0p+99999999999999999999", "inf", "nan", "0x", "1,5"])
def test_what_is_no_frequency_is_refused(stored: Path, frequency: str) -> None:
    data = json.loads(stored.read_text())
    del data["checksums"]["manifest.json"]
    data["layers"]["0"]["rotary"]["inv_freq"][3] = frequency
    with pytest.raises(ArtifactError, match="inv_freq"):
        Manifest.from_json(json.dumps(data), "here")


def test_a_flipped_bit_never_loads_as_another_codec(stored: Path) -> None:
    earlier = json.loads(stored.read_text())
    del earlier["checksums"]["manifest.json"]
    data, store = json.dumps(earlier).encode(), ArtifactStore(stored.parent.parent)
    for bit in _bits(data, 300):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        stored.write_bytes(changed)
        try:
            codec = store.get(stored.parent.name, "model-a")
        except ArtifactError:
            continue
        assert codec.artifact_id == stored.parent.name and codec.layers.keys() == {0, 1}
