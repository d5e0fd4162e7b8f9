"""A model before it is served: layers packed, whether batches and prefixes are right, its markers, its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from quant_core.cache.costs import cache_costs
from quant_core.cache.side_by_side import why_one_row
from quant_core.calibrate.layers import survey_layers
from quant_core.codec.spec import VQSpec
from quant_core.evaluation.model_check import Agreement, ModelCheck, check_model
from server.memory.budget import model_bytes, working_set_bytes
from server.model.loader import LoadedModel, load
from server.output.format import OutputFormat, detect_format

# Bits of the estimate.
BITS = 2


@dataclass(frozen=True)
class ModelReport:
    """What `vecinfer model check` tells.

    Attributes:
        layers: what our caches made of the model.
        one_row: why requests are served one at a time; empty where they are not.
        output: how it marks tool calls and reasoning.
        context_len: tokens, from its config.json.
        weights_bytes: of the loaded weights.
        exact_bytes: of one conversation as long as the context, in mlx-lm's caches.
        packed_bytes: of the same with the packed layers at BITS bits.
        memory_bytes: what this device has for all of it.
    """

    name: str
    layers: ModelCheck
    one_row: str
    output: OutputFormat
    context_len: int
    weights_bytes: int
    exact_bytes: int
    packed_bytes: int
    memory_bytes: int

    @property
    def is_right(self) -> bool:
        """Whether its answers are right as it is served."""
        check = self.layers
        return check.holds or (bool(self.one_row) and check.exact.holds and check.chunks.holds)

    @property
    def lines(self) -> list[str]:
        """The report in words."""
        check, total = self.layers, len(self.layers.kinds)
        lines = [f"{self.name}: {len(check.packed)} of {total} layers are packed"]
        lines += [f"  layers {_span(indices)}: {why}" for why, indices in _by_reason(check.others)]
        lines.append(_line("equal to mlx-lm's own caches", check.exact))
        lines.append(_line("rows of a batch equal each alone", check.batch))
        lines.append(_line("a resumed prefix equals a fresh one", check.resume))
        lines.append(_line("prompts read in other pieces", check.chunks))
        if self.one_row:
            lines.append(f"served one request at a time: {self.one_row}")
        if not check.reads_side_by_side:
            lines.append("prompts are read one at a time: padding would reach this model's recurrent layers")
        marks = self.output.reasoning
        lines.append(f"tool calls: {self.output.name}{'' if self.output.is_native else ' (described in the prompt)'}")
        lines.append("reasoning: " + ("no markers" if marks is None else f"{marks.start!r} to {marks.end!r}"))
        lines.append(
            f"memory: weights {_gb(self.weights_bytes)}; a conversation of {self.context_len:,} tokens "
            f"{_gb(self.packed_bytes)} at {BITS} bits, {_gb(self.exact_bytes)} exact; "
            f"this device has {_gb(self.memory_bytes)}"
        )
        return lines


def check_named(name: str, data_dir: Path, progress: Callable[[str, float | None], None]) -> ModelReport:
    """Load and check a model. MLX thread only.

    Raises:
        ModelError: it cannot be loaded.
        SpecError: mlx-lm cannot batch one of its caches, so it cannot be served.
    """
    loaded = load(name, data_dir, progress)
    progress(f"checking {name}", None)
    return check_loaded(loaded)


def check_loaded(loaded: LoadedModel) -> ModelReport:
    """The report on a loaded model."""
    model, packable = loaded.model, survey_layers(loaded.model).packable
    costs = cache_costs(model)
    exact = [cost.nbytes(loaded.context_len) for cost in costs]
    packed = list(exact)
    for i, g in packable.items():
        specs = VQSpec.for_bits(g.key_dim, BITS), VQSpec.for_bits(g.value_dim, BITS)
        packed[i] = loaded.context_len * g.num_kv_heads * sum(s.code_bytes for s in specs)
    return ModelReport(
        loaded.model_id,
        check_model(model),
        why_one_row(model),
        detect_format(loaded.tokenizer),
        loaded.context_len,
        model_bytes(model),
        int(sum(exact)),
        int(sum(packed)),
        working_set_bytes(),
    )


def _line(what: str, agreement: Agreement) -> str:
    if agreement.error:
        return f"{what}: NO: {agreement.error}"
    return f"{what}: {'yes' if agreement.holds else 'NO'} (apart by {agreement.mean:.4f}, {agreement.limit} allowed)"


def _by_reason(others: dict[int, str]) -> list[tuple[str, list[int]]]:
    reasons: dict[str, list[int]] = {}
    for index, why in others.items():
        reasons.setdefault(why.splitlines()[0], []).append(index)
    return list(reasons.items())


def _span(indices: list[int]) -> str:
    """`0-3, 5` of 0, 1, 2, 3, 5."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
