"""`vecinfer eval` on a tiny model: the report, its plots, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import build_app
from tests.helpers.tiny_models import write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(Path(tmp_path_factory.mktemp("model")), "llama")


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["eval", *arguments])
    return result.exit_code, result.output


def test_report_and_plots_are_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[7:])
    code, output = _run(
        "--model", str(folder), "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"),
        "--fit-text", str(tmp_path / "a.txt"), "--methods", "float16,affine4,learned", "--bits", "4/2",
        "--codebooks", "1",
        "--windows", "1", "--window-len", "256", "--fit-windows", "3", "--fit-window-len", "256", "--chunk", "64",
        "--retrieval", "--lengths", "400", "--depths", "0.5",
        "--json", str(tmp_path / "r.json"), "--plots", str(tmp_path / "plots"), "--data-dir", str(tmp_path),
    )  # fmt: skip
    assert code == 0, output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(r["method"], r["key_bits"], r["value_bits"]) for r in report["results"]] == [
        ("float16", 16.0, 16.0),
        ("affine4", 4.0, 4.0),
        ("learned", 4.0, 2.0),
    ]
    assert report["results"][2]["code_bits_per_channel"] == 3.0
    assert set(report["results"][0]["per_text"]) == {"a", "b"}
    assert len(report["retrieval"]) == 3
    assert report["options"]["texts"] == ["a.txt", "b.txt"]
    for name in ("loss.png", "kl_over_position.png", "retrieval.png"):
        assert (tmp_path / "plots" / name).stat().st_size < 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--bits", "two", "--text", "nowhere.txt"), "keys/values"),
        (("--methods", "magic", "--text", "nowhere.txt"), "magic"),
        ((), "--text"),
    ],
)
def test_refusals_name_what_is_wrong(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, output = _run("--model", str(folder), "--fit-windows", "1", *arguments)
    assert code != 0
    assert message in output
