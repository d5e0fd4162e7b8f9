"""What open pages cost a server that decodes: `python -m tests.tools.page_cost [--pairs 6] [--readers 10] [--tabs]`.

One conversation streams from a real server, in pairs of equal turns: while nobody looks, and while READERS readers
follow what the page's first view follows. The readers are HTTP clients of one other process, which draw nothing: a
browser's own work would be done on the reader's machine. With --tabs they are tabs of a real Chromium instead, on this
machine, whose work takes processors from the server here. Printed per pair and as medians: the server's processor time
a token and its MLX thread's, and tokens/s by the clock, which other programs disturb. Then what the readers cost a
server that has nothing else to do, in processor seconds a second: an upper limit for what they take from decoding.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from playwright.sync_api import sync_playwright

from server.config import ServerConfig, user_data_dir
from tests.faults.process import ServerProcess, server_process
from tests.server.http.page.browsing import Seen, log_in, tab

IDLE_S = 30.0


@dataclass(frozen=True)
class Turn:
    """One stretch of decoding: processor seconds of the server and of its busiest thread, seconds, tokens."""

    process_s: float
    thread_s: float
    wall_s: float
    num_tokens: int

    @property
    def figures(self) -> tuple[float, float, float]:
        """Milliseconds of the process a token, of the thread a token, tokens/s."""
        return (
            1e3 * self.process_s / self.num_tokens,
            1e3 * self.thread_s / self.num_tokens,
            self.num_tokens / self.wall_s,
        )


@dataclass(frozen=True)
class Clock:
    """Processor seconds by thread id."""

    threads: dict[int, float]
    at_s: float

    @classmethod
    def read(cls, process: psutil.Process) -> Clock:
        """Now."""
        return cls({t.id: t.user_time + t.system_time for t in process.threads()}, time.monotonic())

    def since(self, earlier: Clock, num_tokens: int) -> Turn:
        """What went by."""
        spent = [seconds - earlier.threads.get(thread, 0.0) for thread, seconds in self.threads.items()]
        return Turn(sum(spent), max(spent), self.at_s - earlier.at_s, num_tokens)


def decode(server: ServerProcess, num_tokens: int) -> Turn:
    """One streamed answer, from its first token to its last."""
    process = psutil.Process(server.process.pid)
    body = {"messages": [{"role": "user", "content": "Tell me a long story."}], "stream": True}
    body |= {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    count, first = 0, Clock.read(process)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if '"content"' not in line and '"reasoning' not in line:
                continue
            count += 1
            if count == 1:
                first = Clock.read(process)
    # Frames may hold several tokens; all that were asked for were made.
    return Clock.read(process).since(first, num_tokens - 1)


async def read(url: str, key: str, num_readers: int) -> None:
    """Follow the live feed until the process is ended; a line for every piece that comes."""
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=num_readers)) as client:

        async def one() -> None:
            async with client.stream("GET", f"{url}/admin/live", headers={"Authorization": f"Bearer {key}"}) as answer:
                async for _ in answer.aiter_bytes():
                    print(flush=True)

        await asyncio.gather(*(one() for _ in range(num_readers)))


@contextmanager
def readers(server: ServerProcess, num_readers: int) -> Iterator[None]:
    """HTTP clients of another process."""
    command = [
        sys.executable,
        "-m",
        "tests.tools.page_cost",
        "--follow",
        server.url,
        server.admin_key,
        str(num_readers),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(num_readers):
        assert process.stdout.readline(), "the readers ended"
    started = time.monotonic()
    try:
        yield
    finally:
        process.terminate()
        num_told, seconds = process.stdout.read().count(b"\n"), time.monotonic() - started
        process.wait()
    # One a second each, as far as the machine lets them.
    assert num_told > 0.3 * num_readers * seconds, f"{num_told} pieces in {seconds:.0f} s"


@contextmanager
def tabs(server: ServerProcess, num_readers: int) -> Iterator[None]:
    """Tabs of a Chromium here, each logged in and on its first view."""
    environment: dict[str, str | float | bool] = {"PATH": "/usr/bin:/bin", "HOME": str(server.folder)}
    with sync_playwright() as playwright, ExitStack() as stack:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], env=environment)
        pages = [stack.enter_context(tab(browser, Seen())) for _ in range(num_readers)]
        for page in pages:
            log_in(page, server.url, server.admin_key)
            page.wait_for_selector("#model")
        yield
        stack.close()
        browser.close()


def idle(server: ServerProcess, seconds: float = IDLE_S) -> float:
    """Processor seconds a second of a server without requests."""
    process = psutil.Process(server.process.pid)
    first = Clock.read(process)
    time.sleep(seconds)
    spent = Clock.read(process).since(first, 1)
    return spent.process_s / spent.wall_s


def compare(server: ServerProcess, given: argparse.Namespace) -> None:
    """Pairs in turn, the second half of them the other way round."""
    looking = tabs if given.tabs else readers
    decode(server, given.tokens)
    ratios: list[list[float]] = []
    for pair in range(given.pairs):
        turns: dict[bool, Turn] = {}
        for watched in (False, True) if pair % 2 == 0 else (True, False):
            with looking(server, given.readers) if watched else nullcontext():
                turns[watched] = decode(server, given.tokens)
        alone, seen = turns[False].figures, turns[True].figures
        ratios.append([seen[0] / alone[0], seen[1] / alone[1], seen[2] / alone[2]])
        print(
            f"pair {pair + 1}: process {alone[0]:.2f} -> {seen[0]:.2f} ms a token, its MLX thread {alone[1]:.2f} -> "
            f"{seen[1]:.2f} ms, {alone[2]:.1f} -> {seen[2]:.1f} tokens/s",
            flush=True,
        )
    medians = [statistics.median(column) - 1 for column in zip(*ratios, strict=True)]
    print(f"medians: process {medians[0]:+.1%}, MLX thread {medians[1]:+.1%}, tokens/s {medians[2]:+.1%}")
    before = idle(server)
    with looking(server, given.readers):
        print(f"idle: {before:.2%} of a processor, with {given.readers} readers {idle(server):.2%}")


def main() -> None:
    """Serve the demo model of this account, packed, in a scratch folder; or follow, as the other process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--tabs", action="store_true")
    parser.add_argument("--model", default="demo", help="demo, or tiny: random weights, where Python is all of a step")
    parser.add_argument("--follow", nargs=3, metavar=("URL", "KEY", "NUM"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.follow:
        asyncio.run(read(given.follow[0], given.follow[1], int(given.follow[2])))
        return
    settings: dict[str, dict[str, Any]] = {"kv_cache": {"method": "fp16", "pool_bytes": 200_000_000}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.model == "demo":
            settings["model"] = {"name": "demo", "served_name": None}
            settings["kv_cache"]["method"] = "vecinfer"
            (folder / "data").mkdir()
            shutil.copytree(user_data_dir(ServerConfig()) / "artifacts", folder / "data" / "artifacts")
            (folder / "data" / "models").symlink_to((user_data_dir(ServerConfig()) / "models").absolute())
        with server_process(folder, settings) as server:
            compare(server, given)


if __name__ == "__main__":
    main()
