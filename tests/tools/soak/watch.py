"""Samples of a server under a soak: what the system says of its process, and what it says of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    """One look at a server. Figures of the process are 0 where it is not on this machine.

    Attributes:
        time_s: on the monotonic clock.
        rss_bytes: memory of the process in RAM.
        held_bytes, budget_bytes: what conversations and kept beginnings hold, and may.
        running_bytes: of running conversations alone.
        disk_bytes, disk_max_bytes: kept beginnings on disk, and what they may take.
    """

    time_s: float
    rss_bytes: int
    num_descriptors: int
    num_threads: int
    num_running: int
    num_waiting: int
    pages_used: int
    pages_reserved: int
    held_bytes: int
    running_bytes: int
    budget_bytes: int
    disk_bytes: int
    disk_max_bytes: int


class Watch:
    """Looks at one server.

    Args:
        pid: its process; None where it is not on this machine.
        admin_key: opens its status.
    """

    def __init__(self, url: str, pid: int | None, admin_key: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=60)
        self._process = None if pid is None else psutil.Process(pid)

    def look(self) -> Sample:
        """How it is now.

        Raises:
            httpx.HTTPError, psutil.NoSuchProcess: it does not answer, or is gone.
        """
        status = self._client.get("/admin/status").raise_for_status().json()
        process, kv = self._process, status["kv"] or {}
        pages = kv.get("pages", {})
        disk = (status["prefix_cache"] or {}).get("disk") or {}
        return Sample(
            time_s=time.monotonic(),
            rss_bytes=process.memory_info().rss if process else 0,
            num_descriptors=process.num_fds() if process else 0,
            num_threads=process.num_threads() if process else 0,
            num_running=status["requests"]["running"],
            num_waiting=status["requests"]["waiting"],
            pages_used=pages.get("used", 0),
            pages_reserved=pages.get("reserved", 0),
            held_bytes=kv.get("held_bytes", 0),
            running_bytes=kv.get("running_bytes", 0),
            budget_bytes=kv.get("budget_bytes", 0),
            disk_bytes=disk.get("bytes", 0),
            disk_max_bytes=disk.get("max_bytes", 0),
        )

    def counters(self) -> dict[str, float]:
        """The engine's counters, and `http_OUTCOME`: HTTP's requests by how they ended."""
        found: dict[str, float] = dict(self._client.get("/admin/status").raise_for_status().json()["counters"])
        for family in text_string_to_metric_families(self._client.get("/metrics").raise_for_status().text):
            for sample in family.samples:
                if sample.name == "vecinfer_requests_total":
                    name = f"http_{sample.labels['outcome']}"
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()
