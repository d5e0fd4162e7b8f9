"""The dump of generated Metal sources, which Apple's compiler reads in deploy/macos-ci.yml."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from quant_core.backends.kernel_text import manifest
from tests.msl_on_cpu import compiler
from tests.msl_on_cpu.dump import INDEX, dump
from tests.msl_on_cpu.text import PRELUDE

WORKFLOW = Path(__file__).parents[2] / "deploy" / "macos-ci.yml"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    real = mx.fast.metal_kernel
    made = dump(tmp_path_factory.mktemp("metal"), max_variants=2)
    assert mx.fast.metal_kernel is real
    return made


def test_every_kernel_of_the_manifest_is_dumped(files: list[Path]) -> None:
    assert {f.name.rsplit("-", 1)[0] for f in files} == {name for name in manifest() if name != "variants"}
    index = json.loads((files[0].parent / INDEX).read_text())
    assert index["files"] == [f.name for f in files] and index["mlx"] == version("mlx")


def test_each_file_is_one_instantiated_kernel(files: list[Path]) -> None:
    for file in files:
        text = file.read_text()
        assert text.startswith(PRELUDE)
        assert len(re.findall(r"\[\[kernel\]\]\s*void", text)) == 1, file.name
        assert "host_name" in text or "template <" not in text.split("[[kernel]]")[0].rsplit("}", 1)[-1], file.name


def test_the_files_are_what_the_harness_accepts(files: list[Path]) -> None:
    if not compiler.available():
        pytest.skip(f"not run: {compiler.CLANG} is not installed")
    for file in (f for f in files if f.name.startswith(("vq_encode", "vq_append"))):
        text = file.read_text().removeprefix(PRELUDE)
        name = re.search(r"\[\[kernel\]\]\s*void\s+(\w+)", text)
        template = re.search(r"decltype\(\w+(<.*>)\)", text)
        assert name and template
        assert compiler.typecheck(text, name.group(1), template.group(1)) == []


def test_the_workflow_runs_the_dump_the_suite_and_the_doctor() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = workflow["jobs"].values()
    script = "\n".join(step.get("run", "") for step in job["steps"])
    assert job["runs-on"].startswith("macos")
    for part in ("tests.msl_on_cpu.dump", "xcrun", "deploy/run-tests", "vecinfer doctor"):
        assert part in script
