"""Write the Metal text MLX generates for every shipped kernel variant: `python -m tests.msl_on_cpu.dump FOLDER`.

For Apple's own compiler (deploy/macos-ci.yml): each file is one translation unit, in need of MLX's headers only. Works
with and without Metal, since nothing is launched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from quant_core.attention.fused import plan_bands
from quant_core.backends.kernel_text import manifest
from quant_core.backends.metal import MetalBackend
from quant_core.backends.vecinfer import vecinfer_encode_decode_metal, vecinfer_quantize_metal
from quant_core.codec.arrays import ChunkSpans, ChunkVectors
from quant_core.codec.spec import VQSpec
from quant_core.proof.random_codec import random_vector_codec
from quant_core.proof.scenes import make_trial, standard_cases
from quant_core.veloxquant.codebook import subspace_spec
from tests.kernels.checks import variant
from tests.kernels.scene import make_scene
from tests.msl_on_cpu.kernel import capture
from tests.msl_on_cpu.text import PRELUDE

INDEX = "index.json"


@dataclass(eq=False)
class Recorder:
    """A stand-in for `mx.fast.metal_kernel` that keeps the generated text and returns zeros.

    Attributes:
        sources: by file name, the text as Metal gets it.
    """

    sources: dict[str, str] = field(default_factory=dict)

    def metal_kernel(self, name: str, **made_of: Any) -> Callable[..., list[mx.array]]:
        """Same signature and shapes as `mx.fast.metal_kernel`."""
        real: Any = self._real(name=name, **made_of)

        def call(
            *, inputs: Sequence[mx.array], output_shapes: Sequence[Any], output_dtypes: Sequence[Any], **launch: Any
        ) -> list[mx.array]:
            outputs = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
            node = capture(lambda *ins: real(inputs=list(ins), stream=mx.gpu, **outputs, **launch), inputs)
            text = PRELUDE + node["arguments"][1]
            self.sources[f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.metal"] = text
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block the program's kernels are recorded."""
        self._real = mx.fast.metal_kernel
        mx.fast.metal_kernel = self.metal_kernel  # type: ignore[assignment]
        try:
            yield
        finally:
            mx.fast.metal_kernel = self._real


def shipped_sources(max_variants: int | None = None) -> dict[str, str]:
    """Text of every kernel at the variants of manifest.toml, the self-test's geometries, and the paper's key path."""
    rows: list[list[object]] = manifest()["variants"]["rows"]  # type: ignore[assignment]
    recorder = Recorder()
    with recorder.installed():
        backend = MetalBackend()
        for index, row in enumerate(rows[:max_variants]):
            scene = make_scene(variant(row, index), seed=index)
            g, batch = scene.geometry, len(scene.geometry.positions)
            keys = mx.zeros((batch, g.num_kv_heads, g.query_len, g.head_dim), g.dtype)
            backend.vq_append(keys, keys, g.positions, (g.query_len,) * batch, scene.rings, scene.codec, g.window)
            backend.vq_attention(scene.step)
            _encode_and_reconstruct(backend, scene)
        for case in standard_cases()[:max_variants]:
            backend.vq_attention(make_trial(case, 1).step)
        for dtype in (mx.float16, mx.bfloat16, mx.float32):
            _key_path(backend, dtype)
    return recorder.sources


def _encode_and_reconstruct(backend: MetalBackend, scene: Any) -> None:
    for codec in (scene.codec.keys, scene.codec.values):
        backend.vq_encode(mx.zeros((codec.num_kv_heads, 64, codec.spec.head_dim), mx.float16), codec)
    row = int(np.argmax(scene.codes.num_pages))
    backend.vq_reconstruct(scene.codes, row, 0, scene.codes.num_pages[row], scene.codec)
    _prompt(backend, scene)


def _prompt(backend: MetalBackend, scene: Any) -> None:
    g, codec = scene.geometry, scene.codec
    spans = ChunkSpans.of(g.positions, (1,) * len(g.positions), g.window)
    new = mx.zeros((len(g.positions), codec.num_kv_heads, 1, g.head_dim), g.dtype)
    vectors = backend.vq_centre(new, new, g.positions, codec, g.window)
    rings, exact = backend.vq_extend(vectors, spans, scene.rings, g.window)
    codes = (mx.zeros((*exact.shape[1:4], c.spec.code_bytes), mx.uint8) for c in (codec.keys, codec.values))
    (band, *_) = plan_bands(spans, scene.codes.num_pages, g.window)
    keys, _ = backend.vq_columns(scene.codes, band, rings, ChunkVectors(exact, *codes), codec, g.window)
    backend.vq_turn(keys, band, codec, g.window)


def _key_path(backend: MetalBackend, dtype: mx.Dtype) -> None:
    for spec in (VQSpec.for_bits(64, 2), VQSpec.for_bits(80, 3), subspace_spec(128, 8)):
        codec, vectors = random_vector_codec(np.random.default_rng(0), spec, 2), mx.ones((2, 7, spec.head_dim), dtype)
        vecinfer_quantize_metal(vectors, codec, backend=backend)
        vecinfer_encode_decode_metal(vectors, codec, backend=backend)


def dump(folder: Path, max_variants: int | None = None) -> list[Path]:
    """Write the files and an index of them; returns the files."""
    sources = shipped_sources(max_variants)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text)
    index = {"mlx": version("mlx"), "files": sorted(sources)}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return [folder / name for name in sorted(sources)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made when missing")
    files = dump(parser.parse_args().folder)
    print(f"{len(files)} kernels, MLX {version('mlx')}, in {files[0].parent}")


if __name__ == "__main__":
    main()
