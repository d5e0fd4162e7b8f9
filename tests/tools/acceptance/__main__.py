"""What the packed cache promises, on a real model: `python -m tests.tools.acceptance [--model M] [--only ...]`.

Runs the engine in this process on the stored codec of the model (`vecinfer serve` fits one at its first start), prints
one line per promise with its figure, and ends with 1 if one is broken. Speed figures need an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from server.config import ServerConfig
from server.model.blas import ensure_fast_blas


def main() -> int:
    """Run the chosen checks."""
    ensure_fast_blas(print)
    from tests.tools.acceptance.checks import CHECKS
    from tests.tools.acceptance.served import served

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="*", choices=sorted(CHECKS), default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Nothing on disk: an earlier run's prefixes would spare this one the reading that it times.
    settings = {
        "model": {"name": options.model},
        "engine": {"max_num_seqs": 8},
        "calibration": {"auto": "block"},
        "prefix_cache": {"disk_bytes": 0},
    }
    config = ServerConfig.model_validate(settings)
    results = []
    with served(config) as server:
        for name in options.only or CHECKS:
            start = time.perf_counter()
            result = CHECKS[name](server)
            results.append({"check": name, "passed": result.passed, "figures": result.figures})
            mark = "ok    " if result.passed else "BROKEN"
            print(f"{mark} {name:18} {result.figures}  ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(r["passed"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
