"""`vecinfer bench encode`: vectors to codes, by the kernel and by the two ways plain MLX operations can say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.backends.choose import CompositeBackend, choose_backend
from quant_core.codec.codec import VectorCodec
from quant_core.codec.spec import PAGE_SIZE, VQSpec, WindowSpec
from quant_core.errors import KernelError
from quant_core.proof.random_codec import random_layer_codec
from quant_core.proof.scenes import Case
from quant_core.proof.selftest import prove
from server.measure.attention import HeadGeometry
from server.measure.clock import Chain, measure

# A page of one row, and a prompt's chunk.
NUM_TOKENS = (PAGE_SIZE, 2048)
BITS = (1, 2, 4)
Encode = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class EncodeRow:
    """One way to encode `num_tokens` vectors of every KV head.

    Attributes:
        method: "vq_encode", "naive" (broadcast differences) or "matmul" (norms and products).
        ratio: vq_encode's kernel time goes into this method's so many times, in the same run.
    """

    method: str
    bits: int
    num_tokens: int
    kernel_us: float
    call_us: float
    ratio: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        """A row of what `--json` writes."""
        return asdict(self)


def run(
    geometry: HeadGeometry, bits: Sequence[int] = BITS, sizes: Sequence[int] = NUM_TOKENS, backend: str = "auto"
) -> Iterator[EncodeRow]:
    """Measure the three ways at every width and size.

    Raises:
        KernelError: vq_encode disagrees with the reference, or another way with it; nothing is timed then.
    """
    kernels = choose_backend(backend)
    for width in bits:
        spec = VQSpec.for_bits(geometry.head_dim, width)
        codec = random_layer_codec(geometry.num_kv_heads, spec, spec, None)
        if isinstance(kernels, CompositeBackend):
            verdict = prove("vq_encode", kernels, [Case(codec, 1, mx.float16, WindowSpec(), (1,))])
            if not verdict.passed:
                raise KernelError(f"vq_encode is wrong on this machine, so its speed means nothing: {verdict.detail}")
        ways: dict[str, Encode] = {
            "vq_encode": lambda x, c=codec.keys: kernels.vq_encode(x, c),  # type: ignore[misc]
            "naive": lambda x, c=codec.keys: naive(x, c),  # type: ignore[misc]
            "matmul": lambda x, c=codec.keys: by_matmul(x, c),  # type: ignore[misc]
        }
        for num_tokens in sizes:
            x = mx.random.normal((geometry.num_kv_heads, num_tokens, geometry.head_dim)).astype(mx.float16)
            _refuse_different_codes(ways, x, codec.keys)
            base = 0.0
            for method, encode in ways.items():
                timing = measure(_chain(x, encode))
                base = base or max(timing.kernel_us, 1e-3)
                yield EncodeRow(
                    method,
                    width,
                    num_tokens,
                    round(timing.kernel_us, 2),
                    round(timing.call_us, 2),
                    round(timing.kernel_us / base, 2),
                    timing.source,
                )


def naive(vectors: mx.array, codec: VectorCodec) -> mx.array:
    """argmin of `sum (x - c)^2`, differences of every vector to every centroid written out."""
    return _by_section(vectors, codec, lambda x, c: ((x[..., None, :] - c[:, :, None]) ** 2).sum(-1))


def by_matmul(vectors: mx.array, codec: VectorCodec) -> mx.array:
    """argmin of `||c||^2 - 2 x . c`."""
    return _by_section(vectors, codec, lambda x, c: (c**2).sum(-1)[:, :, None] - 2 * (x @ c.swapaxes(-1, -2)))


def _by_section(vectors: mx.array, codec: VectorCodec, distances: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
    heads, tokens, _ = vectors.shape
    codes = []
    for section, tables in zip(codec.spec.sections, codec.codebooks, strict=True):
        part = vectors[..., section.channel_start : section.channel_start + section.num_channels].astype(mx.float32)
        x = part.reshape(heads, tokens, section.num_subvecs, section.subvec_dim).swapaxes(1, 2)
        chosen = mx.array([section.codebook_of(j) for j in range(section.num_subvecs)])
        found = mx.argmin(distances(x, tables.astype(mx.float32)[:, chosen]), axis=-1)
        codes.append(found.astype(mx.uint8).swapaxes(1, 2))
    return mx.concatenate(codes, axis=-1)


def _refuse_different_codes(ways: dict[str, Encode], x: mx.array, codec: VectorCodec) -> None:
    """Every way must find codes as near as the naive one's, but for ties of float32."""
    expected = np.array(naive(x, codec))
    for method, encode in ways.items():
        different = float((np.array(encode(x)) != expected).mean())
        if different > 1e-3:
            raise KernelError(f"{method} finds other codes than the naive way for {different:.1%} of the sub-vectors")


def _chain(x: mx.array, encode: Encode) -> Chain:
    def chain(n: int) -> mx.array:
        vectors, codes = x, mx.zeros((1,), mx.uint8)
        for _ in range(n):
            vectors = mx.depends([vectors], [codes])[0]
            codes = encode(vectors)
        return codes

    return chain
