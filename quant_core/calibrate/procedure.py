"""A calibration: collect -> fit -> evaluate, as a generator of bounded slices on the calling (MLX) thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, TypeVar

from quant_core.artifact.manifest import content_id
from quant_core.backends.base import KernelBackend
from quant_core.calibrate.allocate import measured_specs
from quant_core.calibrate.collect import LayerSamples, collect
from quant_core.calibrate.evaluate import evaluate
from quant_core.calibrate.fit import LayerFit, fit_layer
from quant_core.calibrate.layers import LayerGeometry, survey_layers
from quant_core.calibrate.options import CalibrationOptions
from quant_core.calibrate.presets import sizes_of
from quant_core.calibrate.report import EvaluationReport, GateError
from quant_core.calibrate.tuning import TuningLoss, tune
from quant_core.codec.codec import LayerCodec, ModelCodec
from quant_core.codec.spec import VQSpec
from quant_core.errors import CodecError
from quant_core.slices import Clock, Progress, always, mapped, paced

T = TypeVar("T")

# Less text than this cannot fill 256 centroids a table with anything but the text itself.
MIN_FIT_TOKENS = 512
MIN_DISTINCT_TOKENS = 32
# Cost of a token of evaluation (two caches, with logits) over one of collection, and of fitting a layer, in tokens.
_EVALUATE_COST = 3.0
_TUNE_COST = 5.0
_FIT_COST_TOKENS = 150.0


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """A codec that passed its gate."""

    codec: ModelCodec
    report: EvaluationReport


def calibrate(
    model: Any,
    fit_windows: Sequence[Sequence[int]],
    eval_windows: Sequence[Sequence[int]],
    options: CalibrationOptions,
    *,
    slice_tokens: int = 64,
    slice_s: float = 0.1,
    backend: KernelBackend | None = None,
) -> Generator[Progress, None, CalibrationResult]:
    """Fit and evaluate a codec. Each `next()` does one slice: `slice_tokens` of prefill, or `slice_s` of fitting.

    Closing the generator cancels; nothing outside it was changed.

    Raises:
        CodecError: unusable text or activations, no packable layer; GateError, one of them: KL above the limit.
        SpecError: a geometry no codec can have.
    """
    check_text(fit_windows)
    survey = survey_layers(model)
    if not survey.packable:
        reasons = "; ".join(sorted(set(survey.others.values()))) or "it has none"
        raise CodecError(f"no attention layer of this model can be packed: {reasons}. Use kv_cache.method: fp16")
    sizes, clock = sizes_of(options), Clock("collect")
    costs = _Costs.of(fit_windows, eval_windows, len(survey.packable), sizes.tuning_tokens)
    reading = collect(
        model, fit_windows, survey.packable, options.window, options.seed, slice_tokens, sizes.gradient_tokens
    )
    samples = yield from _told(reading, clock, 0.0, costs.collect, costs.fit_tokens, "reading calibration text")
    clock.phase = "fit"
    fits = yield from _fit(samples, survey.packable, options, clock, costs, slice_s)
    fitted = {i: f.codec for i, f in fits.items()}
    tuning = tune(model, fitted, fit_windows, options.window, sizes.tuning_tokens)
    begin = costs.collect + costs.fit
    layers, tuned = yield from _told(tuning, clock, begin, costs.tune, sizes.tuning_tokens, "tuning the tables")
    codec = _codec(fits, layers, tuned, options, costs.fit_tokens)
    clock.phase = "evaluate"
    scoring = evaluate(model, codec, eval_windows, slice_tokens=slice_tokens, backend=backend)
    begin += costs.tune
    report = yield from _told(scoring, clock, begin, 1 - begin, costs.eval_tokens, "comparing with the exact cache")
    report = replace(report, transforms=dict(codec.info["transforms"]))
    _check_gate(report, options.max_kl)
    return CalibrationResult(codec, report)


def _check_gate(report: EvaluationReport, max_kl: float) -> None:
    if not report.kl_mean <= max_kl:  # NaN is not
        raise GateError(
            f"the codec's mean KL against the exact cache is {report.kl_mean:.4f} nats per token and the limit is "
            f"{max_kl:g}; use more bits, more or more fitting text, or raise calibration.max_kl",
            report,
        )


@dataclass(frozen=True)
class _Costs:
    """Shares of the whole job, and tokens to read."""

    collect: float
    fit: float
    tune: float
    fit_tokens: int
    eval_tokens: int

    @classmethod
    def of(
        cls, fit: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], num_layers: int, num_tuning: int
    ) -> _Costs:
        num_fit, num_eval = sum(map(len, fit)), sum(map(len, held_out))
        fitting, tuning = _FIT_COST_TOKENS * num_layers, _TUNE_COST * num_tuning
        whole = num_fit + fitting + tuning + _EVALUATE_COST * num_eval
        return cls(num_fit / whole, fitting / whole, tuning / whole, num_fit, num_eval)


def check_text(windows: Sequence[Sequence[int]]) -> None:
    """Raise CodecError for text too short or too monotonous to fit tables on."""
    num_tokens, distinct = sum(map(len, windows)), len(set().union(*windows))
    if num_tokens < MIN_FIT_TOKENS:
        raise CodecError(f"the calibration text has {num_tokens} tokens, at least {MIN_FIT_TOKENS} are needed")
    if distinct < MIN_DISTINCT_TOKENS:
        raise CodecError(
            f"the calibration text repeats {distinct} token(s); at least {MIN_DISTINCT_TOKENS} different ones are "
            "needed: give ordinary text, or use the built-in text"
        )


def _specs(geometry: LayerGeometry, options: CalibrationOptions) -> tuple[VQSpec, VQSpec]:
    tables = options.codebooks_per_head
    return (
        VQSpec.for_bits(geometry.key_dim, options.key_bits, tables),
        VQSpec.for_bits(geometry.value_dim, options.value_bits, tables),
    )


def _told(
    work: Generator[int, None, T], clock: Clock, begin: float, share: float, num_tokens: int, what: str
) -> Generator[Progress, None, T]:
    """Slices that report tokens done, as progress in [begin, begin + share]."""

    def progress(done: int) -> Progress:
        part = min(1.0, done / max(1, num_tokens))
        return clock.at(begin + share * part, f"{what}: {done:,} of {num_tokens:,} tokens")

    return mapped(work, progress)


def _fit(
    samples: dict[int, LayerSamples],
    layers: dict[int, LayerGeometry],
    options: CalibrationOptions,
    clock: Clock,
    costs: _Costs,
    slice_s: float,
) -> Generator[Progress, None, dict[int, LayerFit]]:
    """Share the bits out, then fit every layer; small steps are joined into slices of `slice_s`."""

    def progress(done: int) -> Progress:
        fraction = costs.collect + costs.fit * done / len(samples)
        return clock.at(fraction, f"fitting layer {done + 1} of {len(samples)}")

    specs = {i: _specs(g, options) for i, g in layers.items()}
    if options.allocation == "measured":
        sharing = measured_specs(samples, specs, options.transform, options.codebooks_per_head, options.seed)
        specs = yield from _told(sharing, clock, costs.collect, 0.0, len(specs), "measuring what each layer's bits buy")
    return (yield from mapped(paced(_fit_all(samples, specs, options), slice_s), progress))


def _fit_all(
    samples: dict[int, LayerSamples], specs: dict[int, tuple[VQSpec, VQSpec]], options: CalibrationOptions
) -> Generator[int, None, dict[int, LayerFit]]:
    """Fit layer after layer, and drop the samples of each; yields the number of layers done after each small step."""
    fits: dict[int, LayerFit] = {}
    for number, index in enumerate(sorted(samples)):
        steps = fit_layer(samples[index], *specs[index], options.transform, options.seed, index)
        fits[index] = yield from mapped(steps, always(number))
        samples[index].keys.clear()
        samples[index].values.clear()
    return fits


def _codec(
    fits: dict[int, LayerFit],
    layers: dict[int, LayerCodec],
    tuned: TuningLoss | None,
    options: CalibrationOptions,
    num_tokens: int,
) -> ModelCodec:
    transforms = Counter(f"keys {f.key_transform}" for f in fits.values())
    transforms += Counter(f"values {f.value_transform}" for f in fits.values())
    info = {
        "key_bits": options.key_bits,
        "value_bits": options.value_bits,
        "transform": options.transform,
        "codebooks_per_head": max(s.num_codebooks for c in layers.values() for s in c.keys.spec.sections),
        "allocation": options.allocation,
        "transforms": dict(sorted(transforms.items())),
        "position_blind_layers": [i for i, c in layers.items() if c.rotary is None],
        "fit_tokens": num_tokens,
        "tuning": None if tuned is None else {"tokens": sizes_of(options).tuning_tokens, **asdict(tuned)},
        "seed": options.seed,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }
    return ModelCodec(content_id(layers, options.window), layers, options.window, info)
