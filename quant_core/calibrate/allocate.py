"""Bits per layer, for keys and for values apart, under one budget of bytes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

from quant_core.calibrate.collect import LayerSamples
from quant_core.calibrate.fit import Kind, layer_costs
from quant_core.calibrate.options import TransformName
from quant_core.codec.spec import VQSpec
from quant_core.slices import always, mapped

# What a layer can get. 3 bits are left out: two sub-vector sizes have no tensor-core kernel.
WIDTHS = (1, 2, 4)

Specs = dict[int, tuple[VQSpec, VQSpec]]


@dataclass(frozen=True)
class Place:
    """Keys or values of one layer."""

    layer: int
    kind: Kind


def measured_specs(
    samples: Mapping[int, LayerSamples], uniform: Specs, transform: TransformName, tables: int | None, seed: int
) -> Generator[int, None, Specs]:
    """Specs that take no more bytes than `uniform` and lose less; yields the layers measured so far.

    Without gradients every layer's error would count alike, which says nothing: `uniform` is kept.
    """
    if not all(layer.num_gradients for layer in samples.values()):
        return uniform
    costs: dict[Place, dict[int, float]] = {}
    channels: dict[Place, int] = {}
    for done, (index, layer) in enumerate(samples.items()):
        for kind, spec in zip(("keys", "values"), uniform[index], strict=True):
            place = Place(index, kind)  # type: ignore[arg-type]
            trials = {bits: VQSpec.for_bits(spec.head_dim, bits, 1) for bits in WIDTHS}
            measuring = layer_costs(layer, trials, place.kind, transform, seed, index)
            costs[place] = yield from mapped(measuring, always(done))
            channels[place] = layer.geometry.num_kv_heads * spec.head_dim
    budget = sum(8 * spec.code_bytes * samples[i].geometry.num_kv_heads for i, pair in uniform.items() for spec in pair)
    bits = allocate(costs, channels, budget)
    return {
        i: (
            VQSpec.for_bits(keys.head_dim, bits[Place(i, "keys")], tables),
            VQSpec.for_bits(values.head_dim, bits[Place(i, "values")], tables),
        )
        for i, (keys, values) in uniform.items()
    }


def allocate(
    costs: Mapping[Place, Mapping[int, float]], channels: Mapping[Place, int], budget: int
) -> dict[Place, int]:
    """Bits per channel of each place, at most `budget` bits a token in all: always the change that helps most per bit.

    Args:
        costs: expected loss of each place at each width.
        channels: numbers of one token at each place.
        budget: bits of one token, all places; at least one bit per channel.
    """
    chosen = dict.fromkeys(costs, WIDTHS[0])
    used = WIDTHS[0] * sum(channels.values())
    while True:
        best_gain, best = 0.0, None
        for place, bits in chosen.items():
            for more in (w for w in WIDTHS if w > bits):
                price = (more - bits) * channels[place]
                gain = (costs[place][bits] - costs[place][more]) / price
                if used + price <= budget and gain > best_gain:
                    best_gain, best = gain, (place, more, price)
        if best is None:
            return chosen
        place, more, price = best
        chosen[place] = more
        used += price
