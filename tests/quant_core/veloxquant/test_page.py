"""The README's library section, which is the VecInfer page's three snippets, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

from quant_core.attention import patch
from quant_core.cache.vq_cache import VQCache
from quant_core.veloxquant import KVCacheBuilder, KVCacheConfig
from server.model.loader import load
from tests.helpers.tiny_models import write_tiny_model

README = Path(__file__).parents[3] / "README.md"
MODEL, STORE = "mlx-community/Llama-3.2-3B-Instruct-4bit", "./veloxquant_artifacts/"


def snippets() -> list[str]:
    section = README.read_text(encoding="utf-8").split("## Use as a library")[1].split("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found) == 3
    return found


def run_page(model: Path, store: Path, changes: dict[str, str]) -> dict[str, Any]:
    """Run the three snippets in one namespace, with smaller numbers where a test cannot wait."""
    names: dict[str, Any] = {}
    for text in snippets():
        for old, new in {MODEL: str(model), STORE: str(store), **changes}.items():
            text = text.replace(old, new)
        exec(compile(text, str(README), "exec"), names)
    return names


def check_codes_in_use(names: dict[str, Any], text: str, num_tokens: int) -> None:
    """The packed cache says what the exact one says while it reads codes, which do change the logits."""
    model, tokenizer = names["model"], names["tokenizer"]
    cache = KVCacheBuilder.build(model, names["config"])
    ids = tokenizer.encode(text)
    exact = make_prompt_cache(model)
    expected = mlx_lm.generate(model, tokenizer, prompt=ids, max_tokens=num_tokens, prompt_cache=exact)
    got = mlx_lm.generate(model, tokenizer, prompt=ids, max_tokens=num_tokens, prompt_cache=cache)
    assert got == expected and got
    assert all(type(c) is VQCache for c in cache)
    first = cache[0]
    assert first.layer.window.num_code_pages(first.offset - 1) > 0 and len(first.rows[0].pages) == first.offset // 64
    last = mx.array([ids[-1:]])
    difference = float(mx.abs(model(last, cache=cache) - model(last, cache=exact)).max())
    assert difference > 0


def test_the_three_snippets_run(tmp_path: Path) -> None:
    # Heads of 16 channels: eight sub-spaces are 4 bits.
    folder = write_tiny_model(tmp_path / "model", "llama", head_dim=16)
    changes = {
        "num_samples=64": "num_samples=4",
        "num_samples=128": "num_samples=6",
        "max_tokens=1024": "max_tokens=64",
    }
    names = run_page(folder, tmp_path / "store", changes)
    assert patch.is_installed()
    assert names["response"]
    assert names["cache"][0].offset > 400
    assert names["codebook"].num_subspaces == (8,)
    check_codes_in_use(names, "one two three four " * 60, 24)


@pytest.mark.demo
@pytest.mark.slow
def test_the_three_snippets_run_on_the_demo_model(
    demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mlx_lm.load keeps the weights quantised, which MLX multiplies at a third of a token a second on a CPU.
    loaded = load(str(demo_model_dir), tmp_path, lambda line, fraction: None)
    monkeypatch.setattr(mlx_lm, "load", lambda path: (loaded.model, loaded.tokenizer))
    changes = {
        "num_samples=64": "num_samples=3, sample_len=192",
        "num_samples=128": "num_samples=4, sample_len=192",
        "num_subspaces=8": "num_subspaces=32",
        "max_tokens=400": "max_tokens=130",
        "max_tokens=1024": "max_tokens=4",
    }
    names = run_page(demo_model_dir, tmp_path / "store", changes)
    assert len(names["response"]) > 4
    story = "The fox lived in a hollow oak at the edge of the village, and every evening it counted the lamps. " * 12
    check_codes_in_use(names, story + "\nQuestion: What is the capital of France? Answer: The capital of France is", 8)


def test_the_page_s_configuration_reference(tmp_path: Path) -> None:
    """`bits` 3 and other contradictions of the page are refused with the reason."""
    for wrong, reason in (
        ({"bits": 3}, "512 centroids"),
        ({"value_bits": 4}, "num_subspaces"),
        ({"method": "kivi"}, "vecinfer"),
    ):
        with pytest.raises(ValueError, match=reason):
            KVCacheConfig(**wrong)
