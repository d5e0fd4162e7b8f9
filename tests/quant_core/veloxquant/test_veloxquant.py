"""The layer under the page's names: shapes, refusals, saving, and its kernel functions against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_core.codec.spec import VQSpec
from quant_core.errors import ArtifactError, CodecError, ShapeError, SpecError
from quant_core.proof.random_codec import random_vector_codec
from quant_core.veloxquant import (
    KVCacheBuilder,
    KVCacheConfig,
    NpyArtifactStore,
    ProductCodebook,
    calibrate_smooth_factors,
    compute_query_lut,
    train_codebook,
    vecinfer_encode_decode_metal,
    vecinfer_quantize_metal,
)
from quant_core.veloxquant.codebook import subspace_spec
from tests.helpers.tiny_models import build_tiny_model, tiny_tokenizer

TEXTS = [Path(__file__).read_text()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model, tokenizer = build_tiny_model("llama"), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    reported: list[float] = []
    options: dict[str, Any] = {"num_samples": 3, "sample_len": 256, "texts": TEXTS}
    factors = calibrate_smooth_factors(model, tokenizer, **options, on_progress=lambda p: reported.append(p.fraction))
    codebook = train_codebook(model, tokenizer, smooth_factors=factors, num_subspaces=16, **options)
    assert reported[-1] == 1.0
    return {"model": model, "tokenizer": tokenizer, "factors": factors, "codebook": codebook}


def test_the_transform_is_smooth_and_hadamard(trained: dict[str, Any]) -> None:
    """T = c diag(1/lambda) H: scaling rows by lambda leaves an orthogonal matrix, up to c."""
    for index, layer in trained["codebook"].layers.items():
        factors = trained["factors"][index]
        assert factors.shape == (2, 64) and (factors > 0).all()
        rotation = np.array(layer.keys.transform) * factors[:, :, None]
        gram = rotation @ rotation.swapaxes(-1, -2)
        np.testing.assert_allclose(gram / gram[:, :1, :1], np.broadcast_to(np.eye(64), gram.shape), atol=1e-4)


def test_a_saved_codebook_is_the_same_codec(trained: dict[str, Any], tmp_path: Path) -> None:
    store, codebook = NpyArtifactStore(tmp_path), trained["codebook"]
    store.save("codebook", codebook)
    store.save("smooth", trained["factors"])
    loaded = store.load("codebook")
    assert isinstance(loaded, ProductCodebook) and loaded.window == codebook.window
    assert loaded.codec().artifact_id == codebook.codec().artifact_id
    config = KVCacheConfig(codebook=loaded, smooth_factors=store.load("smooth"), num_subspaces=16, use_fused_sdpa=False)
    assert len(KVCacheBuilder.build(trained["model"], config)) == 2


def test_a_codebook_with_a_missing_array_is_refused(trained: dict[str, Any]) -> None:
    arrays = trained["codebook"].to_arrays()
    del arrays["layers.1.keys.mean"]
    with pytest.raises(ArtifactError, match="train it again"):
        ProductCodebook.from_arrays(arrays)


def test_true_bits_are_logged(trained: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quant_core.veloxquant"):
        KVCacheBuilder.build(
            trained["model"], KVCacheConfig(codebook=trained["codebook"], smooth_factors=trained["factors"])
        )
    assert "keys 2, values 2 bits per channel" in caplog.text


def test_what_does_not_fit_is_refused(trained: dict[str, Any]) -> None:
    codebook, factors = trained["codebook"], trained["factors"]
    others = {i: f * 2 for i, f in factors.items()}
    for wrong, reason in (
        ({"smooth_factors": factors}, "codebook must be"),
        ({"codebook": codebook}, "smooth_factors are required"),
        ({"codebook": codebook, "smooth_factors": others}, "not those the codebook was trained with"),
        ({"codebook": codebook, "smooth_factors": factors, "num_subspaces": 8}, "num_subspaces is 8"),
    ):
        with pytest.raises(SpecError, match=reason):
            KVCacheBuilder.build(trained["model"], KVCacheConfig(**wrong))


def test_training_refuses_what_codes_cannot_hold(trained: dict[str, Any]) -> None:
    model, tokenizer, factors = trained["model"], trained["tokenizer"], trained["factors"]
    for wrong, reason in (
        ({"num_centroids": 512}, "one byte"),
        ({"num_subspaces": 7}, r"\[32, 16, 8, 4\]"),
        ({"smooth_factors": {0: factors[0]}}, "layer 1 must be"),
    ):
        with pytest.raises(SpecError, match=reason):
            train_codebook(model, tokenizer, **{"smooth_factors": factors, "texts": TEXTS, **wrong})
    with pytest.raises(CodecError, match="more text"):
        calibrate_smooth_factors(model, tokenizer, texts=["short"])
    with pytest.raises(CodecError, match="repeats"):
        train_codebook(model, tokenizer, smooth_factors=factors, texts=["so " * 3000])


def test_sixteen_channels_a_code_have_a_table_each() -> None:
    spec = subspace_spec(128, 8)
    assert (spec.bits_per_channel, spec.sections[0].num_codebooks) == (0.5, 8)
    assert subspace_spec(128, 64) == VQSpec.for_bits(128, 4)


@pytest.mark.parametrize("spec", [subspace_spec(64, 4), subspace_spec(64, 32), VQSpec.for_bits(64, 3)])
def test_the_look_up_table_gives_the_score_of_the_coded_key(spec: VQSpec) -> None:
    """Codes are the nearest centroids, and sum of lut[j, c_j] + q . mean = q . decoded key."""
    rng = np.random.default_rng(0)
    codec = random_vector_codec(rng, spec, 2)
    keys = mx.array(rng.standard_normal((1, 2, 5, 64)), mx.float32)
    queries = mx.array(rng.standard_normal((1, 2, 3, 64)), mx.float32)
    codes = vecinfer_quantize_metal(keys, codec)
    assert codes.shape == (1, 2, 5, spec.code_bytes) and codes.dtype == mx.uint8
    lut = np.array(compute_query_lut(queries, codec))
    assert lut.shape == (1, 2, 3, spec.code_bytes, 256)
    chosen = np.take_along_axis(lut[:, :, :, None], np.array(codes)[:, :, None, :, :, None].astype(int), axis=-1)
    scores = chosen[..., 0].sum(-1) + np.array(queries @ codec.mean[:, :, None])
    decoded = vecinfer_encode_decode_metal(keys, codec)
    np.testing.assert_allclose(scores, np.array(queries @ decoded.swapaxes(-1, -2)), atol=2e-3)
    # Coding what was decoded changes nothing: it is on the centroids.
    assert float((vecinfer_quantize_metal(decoded, codec) == codes).mean()) > 0.99
    with pytest.raises(ShapeError):
        vecinfer_quantize_metal(keys[..., :32], codec)
