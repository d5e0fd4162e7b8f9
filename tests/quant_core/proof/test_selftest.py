"""The self-test passes what is right, and finds what is wrong: planted faults, one for each thing it compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from quant_core.backends.choose import CompositeBackend
from quant_core.backends.metal import MetalBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.arrays import DecodeStep, RingArrays
from quant_core.codec.spec import PAGE_SIZE, WindowSpec
from quant_core.proof.random_codec import random_codec
from quant_core.proof.scenes import Case, make_trial, model_cases, standard_cases
from quant_core.proof.selftest import KernelVerdict, device_kernels, prove

WINDOW = WindowSpec(window=16, num_sink_tokens=4, bucket_len=PAGE_SIZE)
CODEC = random_codec(2, 2, 64, window=WINDOW)
CASE = replace(
    model_cases(CODEC, {0: 2, 1: 2}, mx.float16)[0],
    query_lens=(1, 8),
    row_lens=(0, 1, PAGE_SIZE - 1, 3 * PAGE_SIZE + 8),
)


def verdicts(device: Any, case: Case = CASE) -> dict[str, KernelVerdict]:
    backend = CompositeBackend(device)
    return {k: prove(k, backend, [case]) for k in device_kernels(backend)}


def test_layers_of_one_geometry_are_one_case() -> None:
    assert len(model_cases(CODEC, {0: 2, 1: 2}, mx.float16)) == 1
    assert len(model_cases(CODEC, {0: 2, 1: 4}, mx.float16)) == 2


def test_a_trial_repeats_and_poisons_dead_slots() -> None:
    first, second = make_trial(CASE, 1), make_trial(CASE, 1)
    assert mx.array_equal(first.codes.pool, second.codes.pool) and mx.array_equal(first.queries, second.queries)
    dead = first.rings.ring_keys[0, :, 1:]  # an empty row's only live slot is its own token's
    assert (dead == 65504).all() and not (first.rings.ring_keys[0, :, 0] == 65504).any()
    assert not (first.codes.page_table[0] != 0).any()


@pytest.mark.parametrize("case", standard_cases(mx.bfloat16)[1:3], ids=lambda c: c.label)
def test_the_reference_passes_its_own_test(case: Case) -> None:
    found = verdicts(ReferenceBackend(), case)
    assert all(v.passed and v.num_checks for v in found.values()), found
    assert all(v.call_s is not None and v.call_s > 0 for v in found.values())


def test_the_metal_kernels_pass_on_the_harness(metal: MetalBackend) -> None:
    found = verdicts(metal)
    assert all(v.passed and v.num_checks for v in found.values()), found


class Faulty(ReferenceBackend):
    """The reference with one fault."""

    name = "faulty"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def vq_append(self, *arguments: Any) -> RingArrays:
        right = super().vq_append(*arguments)
        if self.fault == "append":
            return replace(right, ring_values=right.ring_values * 1.01)
        if self.fault == "append elsewhere":
            return replace(right, sink_keys=right.sink_keys + (right.sink_keys == 65504) * -1000)
        if self.fault == "append nan":
            return replace(right, ring_keys=mx.where(right.ring_keys > 3, mx.nan, right.ring_keys))
        return right

    def vq_encode(self, vectors: mx.array, codec: Any) -> mx.array:
        codes = super().vq_encode(vectors, codec)
        if self.fault == "encode refuses":
            raise RuntimeError("[metal::Device] Unable to build metal library from source\nprogram_source:1:1: error")
        last = mx.arange(codes.shape[-2]) == codes.shape[-2] - 1
        return mx.where(last[:, None], codes ^ 1, codes) if self.fault == "encode" else codes

    def vq_reconstruct(self, codes: Any, row: int, first: int, count: int, codec: Any) -> tuple[mx.array, mx.array]:
        keys, values = super().vq_reconstruct(codes, row, first, count, codec)
        return (keys, values[:, ::-1]) if self.fault == "reconstruct" else (keys, values)

    def vq_attention(self, step: DecodeStep) -> mx.array:
        if self.fault == "attention sinks":
            step = replace(step, rings=replace(step.rings, sink_keys=step.rings.sink_keys * 0))
        if self.fault == "attention position":
            step = replace(step, starts=tuple(s + 1 for s in step.starts))
        if self.fault == "attention page":
            shifted = mx.roll(step.codes.page_table, 1, 1)
            step = replace(step, codes=replace(step.codes, page_table=shifted))
        out = super().vq_attention(step)
        return mx.where(mx.arange(out.shape[2])[:, None] == 7, 0, out) if self.fault == "attention last" else out


FAULTS = {
    "append": "vq_append", "append elsewhere": "vq_append", "append nan": "vq_append", "encode": "vq_encode",
    "encode refuses": "vq_encode", "reconstruct": "vq_reconstruct", "attention sinks": "vq_attention",
    "attention position": "vq_attention", "attention page": "vq_attention", "attention last": "vq_attention",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_its_kernel_alone(fault: str) -> None:
    found = verdicts(Faulty(fault))
    assert {k for k, v in found.items() if not v.passed} == {FAULTS[fault]}
    wrong = found[FAULTS[fault]]
    assert "D64 Hkv2 gqa2" in wrong.detail and wrong.call_s is None
    assert not wrong.error <= wrong.limit


def test_a_kernel_that_does_not_compile_says_why() -> None:
    detail = verdicts(Faulty("encode refuses"))["vq_encode"].detail
    assert "cannot run: [metal::Device] Unable to build metal library from source" in detail


def test_fallbacks_replace_only_the_kernels_named() -> None:
    t = make_trial(CASE, 1)
    broken = Faulty("encode refuses")
    backend = CompositeBackend(broken, fallbacks=("vq_encode",))
    assert backend.name == "faulty (not used: vq_encode)"
    assert backend.vq_encode(t.rings.ring_keys, CODEC.layers[0].keys).shape == (4, 2, WINDOW.ring_slots, 16)
    assert backend.vq_append.__self__ is broken  # type: ignore[attr-defined]


class Fast:
    """A second attention kernel that is wrong, and covers short batches only."""

    name = "vq_attention_mma"

    def supports(self, step: DecodeStep) -> bool:
        return step.queries.shape[2] == 1

    def __call__(self, step: DecodeStep) -> mx.array:
        return mx.zeros_like(step.queries)


def test_the_fast_attention_is_proved_apart_and_gives_way_to_the_portable_one() -> None:
    backend = CompositeBackend(ReferenceBackend(), Fast())
    found = {k: prove(k, backend, [CASE]) for k in device_kernels(backend)}
    assert [k for k, v in found.items() if not v.passed] == ["vq_attention_mma"]
    step = make_trial(CASE, 1).step
    assert not backend.vq_attention(step).any()
    assert CompositeBackend(ReferenceBackend(), Fast(), ["vq_attention_mma"]).vq_attention(step).any()
