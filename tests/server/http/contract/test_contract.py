"""The OpenAPI document is the contract: schemathesis asks every route, over a socket, with all of its checks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.process import ROOT, ServerProcess, server_process
from tests.faults.stored import PACKED, store_for

API_KEY, ADMIN_KEY = "sk-contract", "admin-contract"
# A list or number beyond a limit may also be too large.
CONFIG = """
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
"""
METHODS = ("get", "put", "post", "delete")
Plan = Sequence[tuple[str, dict[str, int]]]
# Of a run of CI: values drawn by chance for every route, several requests in a row, and limits of fields as far as
# the time goes. The full run has all limits (some 9,000 requests) and more of the others.
CI: Plan = (
    ("fuzzing", {"--max-examples": 5}),
    ("stateful", {"--max-examples": 5}),
    ("coverage", {"--max-time": 30}),
)
FULL: Plan = (
    ("fuzzing", {"--max-examples": 40}),
    ("stateful", {"--max-examples": 60}),
    ("coverage", {}),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Everything that a server can have: packed caches, kept responses, embeddings, both keys."""
    folder = tmp_path_factory.mktemp("contract")
    files = {"api_key_file": API_KEY, "admin_key_file": ADMIN_KEY}
    for name, key in files.items():
        (folder / name).write_text(f"{key}\n")
        (folder / name).chmod(0o600)
    store_for(folder / "data", 3)
    settings: dict[str, dict[str, Any]] = {
        **PACKED,
        "calibration": {**PACKED["calibration"], "refine": "off"},
        "model": {"embedding_model": "served"},
        "engine": {"default_max_tokens": 2},
        "http": {"store_responses": True, **{name: str(folder / name) for name in files}},
    }
    with server_process(folder, settings) as server:
        yield server


def run(server: ServerProcess, folder: Path, phase: str, options: dict[str, int], seed: int) -> str:
    """What schemathesis prints; it fails when a check does."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "--config-file", "schemathesis.toml", "run", f"{server.url}/openapi.json"]
    always = {
        "--checks": "all",
        "--header": f"Authorization: Bearer {ADMIN_KEY}",
        "--phases": phase,
        "--seed": seed,
        "--generation-database": "none",
        # Machines of CI are shared.
        "--request-timeout": 60,
        "--max-response-time": 60,
    }
    arguments = [str(part) for pair in {**always, **options}.items() for part in pair]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder), "COLUMNS": "200"}
    environment["SCHEMATHESIS_HOOKS"] = "tests.server.http.contract.meaning"
    ended = subprocess.run(
        [*command, "--no-color", "--continue-on-failure", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    print(ended.stdout[-20_000:], ended.stderr[-2_000:])
    assert ended.returncode == 0, "schemathesis found something: see above"
    return ended.stdout


def check(server: ServerProcess, folder: Path, plan: Plan, seed: int) -> None:
    """No finding, every route was asked, and the server is as it was."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    operations = [(p, m) for p, methods in document["paths"].items() for m in methods if m in METHODS]
    num_cases = {}
    for phase, options in plan:
        said = run(server, folder, phase, options, seed)
        tested, cases = re.search(r"Tested: (\d+)", said), re.search(r"(\d+) generated, (\d+) passed", said)
        assert cases is not None and cases[1] == cases[2]
        assert phase != "fuzzing" or (tested is not None and int(tested[1]) == len(operations))
        num_cases[phase] = int(cases[1])
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert "Traceback" not in server.log
    print(json.dumps({"operations": len(operations), "cases": num_cases, "failures": 0}))


@pytest.mark.slow
def test_every_route_keeps_the_contract(server: ServerProcess, tmp_path: Path) -> None:
    check(server, tmp_path, CI, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3])
def test_every_route_keeps_the_contract_for_long(server: ServerProcess, tmp_path: Path, seed: int) -> None:
    check(server, tmp_path, FULL, seed)
