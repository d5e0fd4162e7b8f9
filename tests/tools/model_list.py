"""`docs/models.md`: every architecture of the installed mlx-lm in our caches. `python -m tests.tools.model_list`.

Small random models (tests/helpers/architectures.py), checked as `vecinfer model check` checks a real one. The tests
make each row anew and compare it (tests/quant_core/evaluation/test_model_check.py).
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import mlx.core as mx

from quant_core.errors import SpecError
from quant_core.evaluation.model_check import Agreement, ModelCheck, check_model
from tests.helpers.architectures import architectures, build_architecture

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Every architecture of mlx-lm {version} in this server's caches: a small random model of each, checked on a CPU by
`python -m tests.tools.model_list`, which writes this page. The tests make every row anew.
`vecinfer model check NAME-OR-FOLDER` says the same of a real model on your machine, with its markers and its memory.

- **Layers**: what mlx-lm keeps for each. KV: keys and values; rotating: a sliding window; arrays: a recurrent state;
  list: several of these. **Packed**: layers whose keys and values are codes. The others keep mlx-lm's caches.
- **Exact**: rows too short for codes equal mlx-lm's own caches.
- **Batch**: eight rows that join and leave equal each alone. Where they do not, requests are served one at a time.
- **Resume**: two rows resumed at a snapshot equal one that read everything.
- **Chunks**: a prompt read in other pieces.
- **Prompts**: how many are read at a time. *One* where mlx-lm's padding leaks into a recurrent state: such a model's
  prompts are read one after another, its answers are generated side by side.

Tool calls and reasoning markers are those of a model's chat template, not of its architecture: random models have
none. mlx-lm tells the parser from the template, and `vecinfer model check` prints both. The formats:
[api.md](api.md#tools).

| architecture | layers | packed | exact | batch | resume | chunks | prompts | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
_SHORT = {"KVCache": "KV", "RotatingKVCache": "rotating", "ArraysCache": "arrays", "CacheList": "list"}


def row(name: str) -> str:
    """The table's row of one architecture. Compiled functions are switched off: MLX builds them with a C++ compiler."""
    mx.disable_compile()
    try:
        check = check_model(build_architecture(name))
    except SpecError as error:
        return _row(name, "", "", *[""] * 5, f"not served: {str(error).split(';')[0]}")
    finally:
        mx.enable_compile()
    agreements = [_says(a) for a in (check.exact, check.batch, check.resume, check.chunks)]
    prompts = "several" if check.reads_side_by_side else "one"
    packed = f"{len(check.packed)} of {len(check.kinds)}"
    return _row(name, _layers(check), packed, *agreements, prompts, _note(check))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _layers(check: ModelCheck) -> str:
    runs = [(kind, len(list(run))) for kind, run in groupby(_SHORT.get(k, k) for k in check.kinds)]
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in runs)


def _says(agreement: Agreement) -> str:
    return "yes" if agreement.holds else "**no**"


def _note(check: ModelCheck) -> str:
    """Why nothing, or not every plain cache, is packed; what mlx-lm cannot do."""
    broken = [
        f"{name}: {a.error.replace('|', '/') if a.error else 'the padding of a batch changes answers'}"
        for name, a in (("batch", check.batch), ("resume", check.resume), ("chunks", check.chunks))
        if not a.holds
    ]
    reasons = {text.splitlines()[0].split(":")[0] for i, text in check.others.items() if check.kinds[i] == "KVCache"}
    served = ["served one request at a time"] if not check.batch.holds else []
    return "; ".join([*served, *broken, *sorted(reasons)])


def main() -> None:
    """Write docs/models.md."""
    lines = []
    for name in architectures():
        lines.append(row(name))
        print(lines[-1], file=sys.stderr, flush=True)
    PAGE.write_text(_HEAD.format(version=version("mlx-lm")) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
