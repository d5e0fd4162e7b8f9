"""Deliberate bugs in the kernels are found: what the checks are worth."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from quant_core.backends import kernel_text as kernel_source
from quant_core.backends.metal import MetalBackend
from quant_core.codec.spec import WindowSpec
from tests.kernels.checks import (
    check_append,
    check_attention,
    check_encode,
    check_prompt,
    check_reconstruct,
    check_ties,
)
from tests.kernels.mutants import APPEND_MUTANTS, ATTENTION_MUTANTS, CODE_MUTANTS, PROMPT_MUTANTS, Mutant
from tests.kernels.scene import Geometry, make_scene
from tests.msl_on_cpu import KernelFault, installed, options

# Small, and yet: two tiles of queries that overlap, two sections, masks, sinks, buckets, wrapped ring, an idle lane;
# and in float16, whose products are made two at a time, with sums in chunks and two slots a lane.
ATTENTION_SCENES = [
    Geometry(
        head_dim=80, num_kv_heads=2, gqa_factor=3, query_len=7, key_bits=3, value_bits=1, dtype=mx.float32,
        positions=(250, 3), window=WindowSpec(64, 4, 64), rotary_dims=40, learned_sinks=True,
    ),
    Geometry(head_dim=64, num_kv_heads=1, gqa_factor=2, dtype=mx.float32, positions=(2 * 64 + 150,), spread=40.0),
    Geometry(
        head_dim=192, num_kv_heads=1, gqa_factor=2, query_len=2, key_bits=1, dtype=mx.float16, positions=(150,),
        window=WindowSpec(64, 4, 64),
    ),
]  # fmt: skip
APPEND_SCENE = Geometry(positions=(149, 60), query_len=8, window=WindowSpec(64, 4, 64))
CODE_SCENE = Geometry(head_dim=80, positions=(60, 300), key_bits=3, value_bits=3, key_tables=4, value_tables=2)
# Buckets of a page, so that a tile of the chunk lies in two; rows at a ring's end, behind sinks, in a later bucket.
PROMPT_SCENE = Geometry(positions=(149, 60, 2), window=WindowSpec(16, 4, 64))


def attention_checks(backend: MetalBackend) -> None:
    for geometry in ATTENTION_SCENES:
        check_attention(backend, make_scene(geometry))


def append_checks(backend: MetalBackend) -> None:
    check_append(backend, make_scene(APPEND_SCENE))


def code_checks(backend: MetalBackend) -> None:
    scene = make_scene(CODE_SCENE)
    x = mx.random.normal((2, 37, 80), key=mx.random.key(0)).astype(mx.float16)
    for codec in (scene.codec.keys, scene.codec.values):
        check_encode(backend, codec, x)
        check_ties(backend, codec)
    check_reconstruct(backend, scene, 1, 1, 2)
    check_prompt(backend, scene, (0, 100))


def prompt_checks(backend: MetalBackend) -> None:
    check_prompt(backend, make_scene(PROMPT_SCENE), (40, 45, 1))


MUTANTS: list[tuple[Mutant, Callable[[MetalBackend], None]]] = [
    *((m, attention_checks) for m in ATTENTION_MUTANTS),
    *((m, append_checks) for m in APPEND_MUTANTS),
    *((m, code_checks) for m in CODE_MUTANTS),
    *((m, prompt_checks) for m in PROMPT_MUTANTS),
]


@pytest.mark.parametrize("checks", [attention_checks, append_checks, code_checks, prompt_checks])
def test_sound_kernels_pass(checks: Callable[[MetalBackend], None], metal: MetalBackend) -> None:
    checks(metal)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[f"{m.file}:{m.old[:40]}:{m.nth}" for m, _ in MUTANTS])
def test_mutant_is_found(
    mutant: Mutant, checks: Callable[[MetalBackend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = kernel_source.read
    monkeypatch.setattr(
        kernel_source, "read", lambda path: mutant.apply(read(path)) if path == mutant.file else read(path)
    )
    kernel_source.load_kernel.cache_clear()
    try:
        with installed(), options(runs=(("random", 1), ("reverse", 0))), pytest.raises((KernelFault, AssertionError)):
            checks(MetalBackend())
    finally:
        kernel_source.load_kernel.cache_clear()
