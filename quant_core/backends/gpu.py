"""What the Metal and CUDA back ends share: everything but the way a kernel is built."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from quant_core.backends import launch, launch_prompt
from quant_core.backends.kernel_text import Dialect, KernelSource, load_kernel
from quant_core.backends.reference import ReferenceBackend
from quant_core.codec.arrays import ChunkSpans, ChunkVectors, ColumnBand, DecodeStep, PagedCodes, RingArrays
from quant_core.codec.codec import LayerCodec, VectorCodec
from quant_core.codec.spec import MAX_DECODE_LEN, WindowSpec


class DeviceBackend:
    """The portable kernels on one device. See KernelBackend for what each function computes.

    Args:
        name: also the dialect of the kernel text.
        build: makes MLX's kernel object of a source.
        target_groups: threadgroups that fill the device; decode attention is cut into about as many runs.
    """

    def __init__(self, name: Dialect, build: Callable[[KernelSource], launch.Launcher], target_groups: int) -> None:
        self.name: str = name
        self._dialect: Dialect = name
        self._build = build
        self._target_groups = target_groups
        self._kernels: dict[str, launch.Launcher] = {}
        self._reference = ReferenceBackend()

    def kernel(self, name: str) -> launch.Launcher:
        """Kernel `name` of the manifest, built on first use."""
        if name not in self._kernels:
            self._kernels[name] = self._build(load_kernel(name, self._dialect))
        return self._kernels[name]

    def vq_append(
        self,
        keys: mx.array,
        values: mx.array,
        starts: tuple[int, ...],
        lengths: tuple[int, ...],
        rings: RingArrays,
        codec: LayerCodec,
        window: WindowSpec,
    ) -> RingArrays:
        # A prompt chunk is a matmul: the plain formulation is the right one.
        if keys.shape[2] > MAX_DECODE_LEN or keys.shape[3] != values.shape[3]:
            return self._reference.vq_append(keys, values, starts, lengths, rings, codec, window)
        return launch.append(self.kernel("vq_append"), keys, values, starts, lengths, rings, codec, window)

    def vq_encode(self, vectors: mx.array, codec: VectorCodec) -> mx.array:
        return launch.encode(self.kernel("vq_encode"), vectors, codec)

    def vq_reconstruct(
        self, codes: PagedCodes, row: int, first_page: int, num_pages: int, codec: LayerCodec
    ) -> tuple[mx.array, mx.array]:
        return launch.reconstruct(self.kernel("vq_reconstruct"), codes, row, first_page, num_pages, codec)

    def vq_centre(
        self, keys: mx.array, values: mx.array, starts: tuple[int, ...], codec: LayerCodec, window: WindowSpec
    ) -> mx.array:
        return launch_prompt.centre(self.kernel("vq_centre"), keys, values, starts, codec, window)

    def vq_extend(
        self, vectors: mx.array, spans: ChunkSpans, rings: RingArrays, window: WindowSpec
    ) -> tuple[RingArrays, mx.array]:
        return launch_prompt.extend(self.kernel("vq_extend"), vectors, spans, rings, window)

    def vq_columns(
        self, codes: PagedCodes, band: ColumnBand, rings: RingArrays, new: ChunkVectors, codec: LayerCodec,
        window: WindowSpec,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        return launch_prompt.columns(self.kernel("vq_columns"), codes, band, rings, new, codec, window)

    def vq_turn(self, vectors: mx.array, band: ColumnBand, codec: LayerCodec, window: WindowSpec) -> mx.array:
        return launch_prompt.turn(self.kernel("vq_turn"), vectors, band, codec, window)

    def vq_attention(self, step: DecodeStep) -> mx.array:
        return launch.attention(self.kernel, step, self._target_groups)
