"""Transforms leave scores unchanged, whatever the head size, and give every sub-vector its share of the variance."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.codec.spec import VQSpec
from quant_core.codec.transform import Moments, deal, hadamard_matrix, learned, smooth_hadamard

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def moments_of(head_dim: int, seed: int = 0, dead: int = 0) -> Moments:
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(head_dim) * 1.5)
    spread[:dead] = 0
    x = rng.standard_normal((4 * head_dim, head_dim)) @ np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0]
    x = x * spread + 3
    q = rng.standard_normal((3 * head_dim, head_dim)) * np.exp(rng.standard_normal(head_dim))
    mean = x.mean(0)
    return Moments(mean, np.cov(x.T, bias=True), np.abs(x - mean).max(0), q.T @ q / len(q))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["learned", "smooth_hadamard"])
def test_transforms_leave_scores_unchanged_in_float32(head_dim: int, kind: str) -> None:
    moments = moments_of(head_dim)
    spec = VQSpec.for_bits(head_dim, 2)
    t = learned(moments, spec) if kind == "learned" else smooth_hadamard(moments)
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 50, head_dim)).astype(np.float32)
    q_in = q @ t.inverse.T.astype(np.float32)
    k_in = (k - moments.mean.astype(np.float32)) @ t.matrix.astype(np.float32)
    scores = q_in @ k_in.T + (q @ moments.mean.astype(np.float32))[:, None]
    scale = np.linalg.norm(q_in, axis=1).max() * np.linalg.norm(k_in, axis=1).max()
    np.testing.assert_allclose(scores, q @ k.T, atol=2e-6 * max(scale, 100))


@pytest.mark.parametrize("kind", ["learned", "smooth_hadamard"])
def test_transformed_vectors_have_unit_rms(kind: str) -> None:
    moments = moments_of(64)
    t = learned(moments, VQSpec.for_bits(64, 2)) if kind == "learned" else smooth_hadamard(moments)
    power = np.trace(t.matrix.T @ moments.covariance @ t.matrix) / 64
    assert power == pytest.approx(1, rel=1e-9)


def test_dead_channels_keep_the_transform_well_conditioned() -> None:
    moments = moments_of(64, dead=10)
    for t in (learned(moments, VQSpec.for_bits(64, 2)), smooth_hadamard(moments)):
        assert np.linalg.cond(t.matrix) < 1e4
        np.testing.assert_allclose(t.matrix @ t.inverse, np.eye(64), atol=1e-9)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 48, 56, 72, 88, 104, 120, 136, 160, 184, *HEAD_DIMS])
def test_hadamard_is_orthogonal_for_every_head_size(head_dim: int) -> None:
    h = hadamard_matrix(head_dim)
    np.testing.assert_allclose(h @ h.T, np.eye(head_dim), atol=1e-12)
    if head_dim != 184:  # no simple construction: the cosine transform
        np.testing.assert_allclose(np.abs(h), 1 / np.sqrt(head_dim), atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_dealing_is_a_permutation_that_gives_each_subvector_one_axis_of_each_quantile(bits: int) -> None:
    spec = VQSpec.for_bits(128, bits)
    ranks = deal(spec)
    assert sorted(ranks) == list(range(128))
    for section in spec.sections:
        mine = np.array(ranks[section.channel_start : section.channel_start + section.num_channels])
        quantiles = (mine - section.channel_start).reshape(-1, section.subvec_dim) // section.num_subvecs
        assert (quantiles == np.arange(section.subvec_dim)).all()


def test_weighting_by_queries_lowers_the_error_of_scores() -> None:
    moments = moments_of(64)
    spec = VQSpec.for_bits(64, 2)
    blind = Moments(moments.mean, moments.covariance, moments.max_abs)
    rng = np.random.default_rng(2)
    assert moments.query_moment is not None
    root = np.linalg.cholesky(moments.query_moment)
    noise = rng.standard_normal((2000, 64)) * 0.1
    errors = []
    for t in (learned(moments, spec), learned(blind, spec)):
        errors.append(np.mean((noise @ t.inverse @ root) ** 2))
    assert errors[0] < errors[1]
