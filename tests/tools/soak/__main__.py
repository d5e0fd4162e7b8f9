"""Mixed clients at equal load for hours: `python -m tests.tools.soak --hours 1`.

Starts a server in a process of its own on a tiny random model (--model demo or a folder: on that one; --url: asks a
server that runs). Callers use all generation APIs, with streams and without; some hang up, some are refused, some
answers are held to schemas. Ends with a table: every request by how it ended, pages, descriptors, threads, and the
slope of the memory with its standard error. Its exit code is 1 if a request was lost or failed, something is still
held, or a budget was not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.config import ServerConfig, user_data_dir
from server.model.blas import ensure_fast_blas
from tests.tools.soak.report import table
from tests.tools.soak.run import SoakPlan, soak
from tests.tools.soak.watch import Sample, Watch

TINY_POOL_BYTES, TINY_DISK_BYTES = 24_000_000, 8_000_000


def main() -> int:
    """Soak as the options say."""
    ensure_fast_blas(print)
    options = _parser().parse_args()
    duration_s = 60 * options.minutes if options.minutes is not None else 3600 * options.hours
    with _server(options) as (url, pid, admin_key):
        (model,) = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][:1]
        watch = Watch(url, pid, admin_key)
        plan = SoakPlan(
            url, model["id"], duration_s, options.context_len or model["max_model_len"], options.callers,
            options.pause, options.sample, options.seed,
        )  # fmt: skip
        print(f"soak of {duration_s / 60:.1f} min on {plan.model}: {plan}", flush=True)
        found = soak(plan, watch, _say)
    print(table(found), flush=True)
    return 1 if found.broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, help="in the place of --hours")
    parser.add_argument("--model", default="tiny", help="tiny (random, default), demo, or a folder")
    parser.add_argument("--url", help="a server that runs already; with --pid its memory is watched too")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--admin-key", help="of that server (default: that of the data directory)")
    parser.add_argument("--method", choices=["vecinfer", "fp16"], default="vecinfer")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two requests of a caller, on average")
    parser.add_argument("--sample", type=float, default=10.0, help="seconds between two looks at the server")
    parser.add_argument("--pool-bytes", type=int, help="memory for conversations (tiny: 24 MB)")
    parser.add_argument("--disk-bytes", type=int, help="disk for kept beginnings (tiny: 8 MB)")
    parser.add_argument("--context-len", type=int, help="prompts are chosen for (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, int | None, str]]:
    """URL, process and admin key of the server to ask."""
    if options.url is not None:
        key = options.admin_key or (user_data_dir(ServerConfig()) / "admin_key").read_text().splitlines()[-1]
        yield options.url.rstrip("/"), options.pid, key
        return
    from tests.tools.soak.served import served

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        server = stack.enter_context(served(folder, options.model, _settings(options)))
        yield server.url, server.process.pid, server.admin_key


def _settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    tiny = options.model == "tiny"
    pool = options.pool_bytes or (TINY_POOL_BYTES if tiny else None)
    disk = options.disk_bytes if options.disk_bytes is not None else (TINY_DISK_BYTES if tiny else None)
    settings: dict[str, dict[str, Any]] = {"kv_cache": {"method": options.method}}
    if pool is not None:
        settings["kv_cache"]["pool_bytes"] = pool
    if disk is not None:
        settings["prefix_cache"] = {"disk_bytes": disk}
    return settings


def _say(sample: Sample) -> None:
    print(
        f"{sample.rss_bytes / 2**20:8.1f} MiB  {sample.num_descriptors} descriptors  {sample.num_threads} threads  "
        f"{sample.pages_used} pages  {sample.num_running} running",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
