"""Is this machine's GPU right? Every kernel against the reference back end, on the geometries that will be used.

Apple's compiler and drivers differ by machine and version, so the proof is made where the kernels run: each kernel is
compiled for each geometry and compared on random data; one that fails is replaced by the reference (CompositeBackend).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.attention.fused import plan_bands
from quant_core.backends.base import KernelBackend
from quant_core.backends.choose import KERNELS, CompositeBackend
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand, DecodeStep
from quant_core.codec.codec import VectorCodec
from quant_core.codec.spec import PAGE_SIZE
from quant_core.errors import QuantError
from quant_core.proof.scenes import Case, Trial, make_trial
from quant_core.slices import run

log = logging.getLogger(__name__)

# Relative error of a row's attention by dtype: TF32 matmuls in float32; products and probabilities in half precision
# otherwise (measured on an H100: up to 3.0e-3 in float16), and one rounding of the result.
ATTENTION_LIMITS = {mx.float32: 3e-3, mx.float16: 5e-3, mx.bfloat16: 5e-3}
# Relative error of an appended vector, stored in float16.
APPEND_LIMIT = 2e-3
# How much farther than the nearest centroid a chosen one may be.
ENCODE_LIMIT = 1e-3
_NUM_TIMED = 5
# New tokens of the prompt chunk that the kernels of a prompt are shown.
_CHUNK_LEN = 150
# What MLX raises for a kernel that does not compile or launch.
_REFUSALS = (RuntimeError, ValueError, TypeError, QuantError)

_REFERENCE = ReferenceBackend()


@dataclass(frozen=True)
class KernelVerdict:
    """What the self-test found about one kernel.

    Attributes:
        kernel: one of KERNELS.
        passed: whether it may run.
        error: the largest error seen, in the units of `limit`; infinite when it did not compile or run.
        limit: what was allowed where the error was largest.
        worst: geometry of that error, or of the failure.
        detail: what went wrong; empty when it passed.
        num_checks: comparisons made.
        call_s: seconds a call takes at the first geometry, one row of the longest length; None when it failed.
    """

    kernel: str
    passed: bool
    error: float
    limit: float
    worst: str
    detail: str
    num_checks: int
    call_s: float | None


@dataclass(frozen=True)
class _Finding:
    error: float
    limit: float
    where: str


F64 = np.ndarray[Any, np.dtype[np.float64]]
Check = Callable[[CompositeBackend, Trial], Iterator[_Finding]]
# One call of a kernel on a trial, its arguments made beforehand.
Call = Callable[[CompositeBackend, Trial], Callable[[], object]]


@dataclass(frozen=True)
class _KernelCheck:
    """How one kernel is proved.

    Attributes:
        check: its results on a trial against the reference's.
        call: what is timed.
        takes_new: whether its text depends on the number of new positions.
    """

    check: Check
    call: Call
    takes_new: bool = False


def device_kernels(backend: KernelBackend) -> tuple[str, ...]:
    """The kernels of a back end that need a proof: none of the reference's."""
    if not isinstance(backend, CompositeBackend):
        return ()
    return tuple(k for k in KERNELS if k != "vq_attention_mma" or backend.fast is not None)


def prove(kernel: str, backend: CompositeBackend, cases: Sequence[Case]) -> KernelVerdict:
    """Compile and check `kernel` on all cases. A kernel that cannot be compiled or launched has failed."""
    return run(prove_slices(kernel, backend, cases))


def prove_slices(kernel: str, backend: CompositeBackend, cases: Sequence[Case]) -> Generator[None, None, KernelVerdict]:
    """`prove`, a geometry and number of new positions at a time, so that chats can go on between them."""
    check = _CHECKS[kernel].check
    found: list[_Finding] = []
    timed: Case | None = None
    for case in cases:
        try:
            for trial in _trials(kernel, case):
                for finding in check(backend, trial):
                    found.append(finding)
                    timed = timed or case
                    if not finding.error <= finding.limit:  # NaN fails too
                        return _failed(kernel, finding, len(found), "the result is wrong")
                yield
        except _REFUSALS as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            finding = _Finding(math.inf, 0.0, case.label)
            return _failed(kernel, finding, len(found) + 1, f"it cannot run: {text[0][:300]}")
    seconds = None if timed is None else _call_seconds(kernel, backend, timed)
    nothing = _Finding(0.0, 0.0, "none of these geometries")
    worst = max(found, key=lambda f: f.error / f.limit if f.limit else f.error, default=nothing)
    return KernelVerdict(kernel, True, worst.error, worst.limit, worst.where, "", len(found), seconds)


def _trials(kernel: str, case: Case) -> Iterator[Trial]:
    """What a kernel is shown: for those that take new positions every number of them, and the longest row alone."""
    if not _CHECKS[kernel].takes_new:
        yield make_trial(case, 1)
        return
    for query_len in case.query_lens:
        yield make_trial(case, query_len)
    yield make_trial(replace(case, row_lens=case.row_lens[-1:]), 1)


def _failed(kernel: str, finding: _Finding, num_checks: int, what: str) -> KernelVerdict:
    detail = f"{what} ({finding.where}: error {finding.error:.2e}, allowed {finding.limit:.2e})"
    return KernelVerdict(kernel, False, finding.error, finding.limit, finding.where, detail, num_checks, None)


def log_fallbacks(verdicts: Sequence[KernelVerdict], device: str) -> None:
    """A warning for each kernel that will not run."""
    for v in verdicts:
        if not v.passed:
            instead = "the portable kernel" if v.kernel == "vq_attention_mma" else "the reference back end"
            log.warning("%s kernel %s failed its self-test, %s replaces it: %s", device, v.kernel, instead, v.detail)


def _check_portable(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    return _check_attention(backend.device.vq_attention, t)


def _check_fast(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """Nothing where the kernel leaves the geometry to the portable one."""
    fast = backend.fast
    return _check_attention(fast, t) if fast is not None and fast.supports(t.step) else iter(())


def _check_attention(attention: Callable[[DecodeStep], mx.array], t: Trial) -> Iterator[_Finding]:
    """Every row's output; rows differ in length, so one wrong token shows in its own row."""
    got = _f64(attention(t.step))
    with mx.stream(mx.cpu):
        want = _f64(_REFERENCE.vq_attention(t.step))
    for row, start in enumerate(t.starts):
        error = float(np.linalg.norm(got[row] - want[row])) / max(float(np.linalg.norm(want[row])), 1e-30)
        yield _Finding(error, ATTENTION_LIMITS[t.case.dtype], _where(t, f"row of {start} tokens"))


def _check_append(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """New vectors by relative error; slots that were not written, bit for bit."""
    arguments = (t.keys, t.values, t.starts, t.lengths, t.rings, t.case.codec, t.case.window)
    results = backend.device.vq_append(*arguments)
    with mx.stream(mx.cpu):
        wanted = _REFERENCE.vq_append(*arguments)
    for name in ("ring_keys", "ring_values", "sink_keys", "sink_values"):
        got, want, before = (_f64(getattr(r, name)) for r in (results, wanted, t.rings))
        if not want.size:
            continue
        kept = want == before
        if not np.array_equal(got[kept], want[kept]):
            yield _Finding(math.inf, 0.0, _where(t, f"{name}: a slot changed that holds no new token"))
        difference = np.linalg.norm(got - want, axis=-1) / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
        yield _Finding(float(difference.max()), APPEND_LIMIT, _where(t, name))


def _check_encode(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """Exact vectors of a ring, outliers and poison included, and as few as one token."""
    for vectors, codec, kind in (
        (t.rings.ring_keys, t.case.codec.keys, "keys"),
        (t.rings.ring_values, t.case.codec.values, "values"),
    ):
        for part in (vectors[-1][:, 40:105], vectors[-1][:, :1], vectors[:2, :, :33]):
            x = mx.clip(part, -100, 100)
            excess = _encode_excess(np.array(backend.device.vq_encode(x, codec)), _f64(x), codec)
            yield _Finding(excess, ENCODE_LIMIT, _where(t, f"{kind}, {part.shape[-2]} tokens"))


def _encode_excess(codes: np.ndarray[Any, Any], x: F64, codec: VectorCodec) -> float:
    """How much farther than the nearest centroid the chosen one is, at most, relative to what rounding explains."""
    worst, column = 0.0, 0
    for section, table in zip(codec.spec.sections, codec.codebooks, strict=True):
        entries = _f64(table)
        for j in range(section.num_subvecs):
            at = section.channel_start + j * section.subvec_dim
            part = x[..., at : at + section.subvec_dim]
            centroids = entries[:, section.codebook_of(j)]
            distance = ((part[..., None, :] - centroids[:, None]) ** 2).sum(-1)
            chosen = np.take_along_axis(distance, codes[..., column + j, None].astype(np.int64), -1)[..., 0]
            # ||c||^2 - 2<x, c> in float32 rounds relative to ||x||^2, which dwarfs a small distance.
            nearest = distance.min(-1) + 0.01 * (1 + (part**2).sum(-1))
            worst = max(worst, float(((chosen - distance.min(-1)) / nearest).max()))
        column += section.num_subvecs
    return worst


def _check_reconstruct(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """Bit for bit: of the longest row its first page, its last, and all."""
    row = int(np.argmax(t.codes.num_pages))
    count = t.codes.num_pages[row]
    for first, number in ((0, 1), (count - 1, 1), (0, count)) if count else ():
        results = backend.device.vq_reconstruct(t.codes, row, first, number, t.case.codec)
        with mx.stream(mx.cpu):
            wanted = _REFERENCE.vq_reconstruct(t.codes, row, first, number, t.case.codec)
        for kind, got, want in zip(("keys", "values"), results, wanted, strict=True):
            share = float(np.mean(_f64(got) != _f64(want)))
            where = f"share of {kind} that differs in pages {first} to {first + number - 1}"
            yield _Finding(share, 0.0, _where(t, where))


def _check_centre(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """By relative error of a vector."""
    arguments = (*_raw_chunk(t), t.starts, t.case.codec, t.case.window)
    got = _f64(backend.device.vq_centre(*arguments))
    with mx.stream(mx.cpu):
        want = _f64(_REFERENCE.vq_centre(*arguments))
    difference = np.linalg.norm(got - want, axis=-1) / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
    yield _Finding(float(difference.max()), APPEND_LIMIT, _where(t, "a chunk behind every row"))


def _check_extend(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """Bit for bit."""
    chunk = _chunk(t)
    arguments = (chunk.vectors, chunk.spans, t.rings, t.case.window)
    rings, exact = backend.device.vq_extend(*arguments)
    with mx.stream(mx.cpu):
        wanted, wanted_exact = _REFERENCE.vq_extend(*arguments)
    for got, want in zip((*rings.arrays, exact), (*wanted.arrays, wanted_exact), strict=True):
        share = float(np.mean(_f64(got) != _f64(want))) if want.size else 0.0
        yield _Finding(share, 0.0, _where(t, "share that differs behind a chunk"))


def _check_columns(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """Bit for bit: a chunk that reaches into the next page, behind every row."""
    chunk = _chunk(t)
    for band in chunk.bands:
        arguments = (t.codes, band, t.rings, chunk.new, t.case.codec, t.case.window)
        results = backend.device.vq_columns(*arguments)
        with mx.stream(mx.cpu):
            wanted = _REFERENCE.vq_columns(*arguments)
        for kind, got, want in zip(("keys", "values"), results, wanted, strict=True):
            share = float(np.mean(_f64(got) != _f64(want)))
            yield _Finding(share, 0.0, _where(t, f"share of {kind} that differs"))


def _check_turn(backend: CompositeBackend, t: Trial) -> Iterator[_Finding]:
    """By relative error of a key, where the row has a column."""
    codec, window, rng = t.case.codec, t.case.window, np.random.default_rng(5)
    for band in _chunk(t).bands:
        shape = (len(band.rows), codec.num_kv_heads, band.num_columns, codec.keys.spec.head_dim)
        vectors = mx.array(rng.standard_normal(shape), mx.float16)
        got = _f64(backend.device.vq_turn(vectors, band, codec, window))
        with mx.stream(mx.cpu):
            want = _f64(_REFERENCE.vq_turn(vectors, band, codec, window))
        for row, plan in enumerate(band.rows):
            a, b = got[row, :, : plan.num_columns], want[row, :, : plan.num_columns]
            difference = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
            yield _Finding(float(difference.max()), APPEND_LIMIT, _where(t, f"keys behind {plan.start} tokens"))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A prompt chunk of random contents behind every row of a trial; the pages it completes are not in the pool."""

    vectors: mx.array
    spans: ChunkSpans
    bands: tuple[ColumnBand, ...]
    new: ChunkVectors


def _raw_chunk(t: Trial) -> tuple[mx.array, mx.array]:
    rng, codec = np.random.default_rng(4), t.case.codec
    shape = (len(t.starts), codec.num_kv_heads, _CHUNK_LEN, codec.keys.spec.head_dim)
    keys, values = (mx.array(rng.standard_normal(shape), mx.float32).astype(t.case.dtype) for _ in range(2))
    return keys, values


def _chunk(t: Trial) -> _Chunk:
    codec, window, rng = t.case.codec, t.case.window, np.random.default_rng(3)
    spans = ChunkSpans.of(t.starts, (_CHUNK_LEN,) * len(t.starts), window)
    heads, dim = codec.num_kv_heads, codec.keys.spec.head_dim

    def exact(length: int) -> mx.array:
        return mx.array(rng.standard_normal((2, len(t.starts), heads, length, dim)), mx.float16)

    def plain(half: VectorCodec) -> mx.array:
        shape = (len(t.starts), heads, spans.num_exact, half.spec.code_bytes)
        return mx.array(rng.integers(0, 256, shape, np.uint8))

    new = ChunkVectors(exact(spans.num_exact), plain(codec.keys), plain(codec.values))
    pooled = tuple(s // PAGE_SIZE for s in t.starts)
    bands = plan_bands(spans, tuple(map(min, pooled, t.codes.num_pages)), window)
    return _Chunk(exact(_CHUNK_LEN), spans, bands, new)


def _call_append(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    arguments = (t.keys, t.values, t.starts, t.lengths, t.rings, t.case.codec, t.case.window)
    return lambda: backend.device.vq_append(*arguments).ring_keys


def _call_encode(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    return lambda: backend.device.vq_encode(t.rings.ring_keys[0][:, :PAGE_SIZE], t.case.codec.keys)


def _call_reconstruct(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    return lambda: backend.device.vq_reconstruct(t.codes, 0, 0, t.codes.num_pages[0], t.case.codec)


def _call_centre(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    keys, values = _raw_chunk(t)
    return lambda: backend.device.vq_centre(keys, values, t.starts, t.case.codec, t.case.window)


def _call_extend(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    chunk = _chunk(t)
    return lambda: backend.device.vq_extend(chunk.vectors, chunk.spans, t.rings, t.case.window)[1]


def _call_columns(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    chunk = _chunk(t)
    return lambda: backend.device.vq_columns(t.codes, chunk.bands[0], t.rings, chunk.new, t.case.codec, t.case.window)


def _call_turn(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    chunk, codec, window = _chunk(t), t.case.codec, t.case.window
    keys, _ = _REFERENCE.vq_columns(t.codes, chunk.bands[0], t.rings, chunk.new, codec, window)
    return lambda: backend.device.vq_turn(keys, chunk.bands[0], codec, window)


def _call_portable(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    return lambda: backend.device.vq_attention(t.step)


def _call_fast(backend: CompositeBackend, t: Trial) -> Callable[[], object]:
    attention = backend.fast or backend.device.vq_attention
    return lambda: attention(t.step)


_CHECKS = {
    "vq_append": _KernelCheck(_check_append, _call_append, takes_new=True),
    "vq_encode": _KernelCheck(_check_encode, _call_encode),
    "vq_reconstruct": _KernelCheck(_check_reconstruct, _call_reconstruct),
    "vq_centre": _KernelCheck(_check_centre, _call_centre),
    "vq_extend": _KernelCheck(_check_extend, _call_extend),
    "vq_columns": _KernelCheck(_check_columns, _call_columns),
    "vq_turn": _KernelCheck(_check_turn, _call_turn),
    "vq_attention": _KernelCheck(_check_portable, _call_portable, takes_new=True),
    "vq_attention_mma": _KernelCheck(_check_fast, _call_fast, takes_new=True),
}


def _call_seconds(kernel: str, backend: CompositeBackend, case: Case) -> float:
    """Median seconds of a call on one row of the longest length, launch and wait included."""
    call = _CHECKS[kernel].call(backend, make_trial(replace(case, row_lens=case.row_lens[-1:]), 1))
    mx.eval(call())
    times = []
    for _ in range(_NUM_TIMED):
        begin = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - begin)
    return sorted(times)[_NUM_TIMED // 2]


def _where(t: Trial, what: str) -> str:
    return f"{t.case.label}, {t.query_len} new, {what}"


def _f64(array: mx.array) -> F64:
    return np.array(array.astype(mx.float32), np.float64)
