"""The quality floor: 2 bits on the demo model, fitted on one of the project's own documents and scored on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant_core.codec.spec import WindowSpec
from quant_core.evaluation.methods import make_methods
from quant_core.evaluation.methods.base import FitText
from quant_core.evaluation.score import ScoreOptions, score
from quant_core.slices import run
from server.model.loader import load

DOCS = Path(__file__).parents[3] / "docs"
WINDOW = WindowSpec()
# Measured: .043, with three short windows to fit on and one table per head.
MAX_KL = 0.08


def _windows(tokenizer: Any, name: str, count: int, length: int) -> list[list[int]]:
    tokens = tokenizer.encode((DOCS / name).read_text(encoding="utf-8")[: 8 * count * length])
    return [list(tokens[i * length : (i + 1) * length]) for i in range(count)]


@pytest.mark.demo
@pytest.mark.slow
def test_two_bits_stay_close_to_the_exact_cache(demo_model_dir: Path, tmp_path: Path) -> None:
    loaded = load(str(demo_model_dir), tmp_path, lambda line, fraction: None)
    fit = FitText(loaded.model, _windows(loaded.tokenizer, "decisions.md", 3, 256), WINDOW, 1, gradient_tokens=0)
    methods = make_methods(["learned"], [(2, 2)])
    run(methods[0].prepare(fit))
    texts = {"design": _windows(loaded.tokenizer, "design.md", 1, 320)}
    (packed,) = run(score(loaded.model, methods, texts, WINDOW, ScoreOptions(256, 8)))
    assert packed.loss.kl_mean < MAX_KL
    assert packed.held.code_bits_per_channel == 2.0
