"""What a soak found: the table, and what of it must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.tools.soak.caller import ENDS
from tests.tools.soak.slope import Slope, slope
from tests.tools.soak.watch import Sample

MIB = 2**20
# The server's caches fill first: growth is looked for after this part of the time.
WARM_UP = 0.25
# Counters of the engine by which an accepted request ends.
ENGINE_ENDS = ("finished_requests", "aborted_requests", "refused_requests", "failed_requests")
HTTP_ENDS = ("http_ok", "http_aborted", "http_error", "http_rejected")


@dataclass(frozen=True)
class SoakReport:
    """Everything that was counted and sampled.

    Attributes:
        num_sent: requests that callers sent.
        ends: how they ended, by kind of request and end.
        statuses: HTTP statuses from 500 on, by how often.
        notes: what went wrong, the first few.
        counters: the server's own, at the end less those at the start.
        samples: in order of time; the last one is taken when nothing runs any more.
    """

    num_sent: int
    ends: Counter[tuple[str, str]]
    statuses: Counter[int]
    notes: tuple[str, ...]
    counters: dict[str, float]
    samples: Sequence[Sample]

    @property
    def num_by_end(self) -> dict[str, int]:
        """Requests by how they ended."""
        return {end: sum(n for (_, e), n in self.ends.items() if e == end) for end in ENDS}

    @property
    def growth(self) -> Slope | None:
        """Memory of the process over time, in bytes per second, after the warm-up; None: not known."""
        first, last = self.samples[0].time_s, self.samples[-1].time_s
        settled = [s for s in self.samples if s.time_s >= first + WARM_UP * (last - first)]
        if not settled or not settled[0].rss_bytes:
            return None
        try:
            return slope([s.time_s for s in settled], [float(s.rss_bytes) for s in settled])
        except ValueError:
            return None

    @property
    def broken(self) -> list[str]:
        """What must not be; growth is judged by the reader, who knows how long this ran."""
        last, by_end = self.samples[-1], self.num_by_end
        budgets = [s for s in self.samples if s.held_bytes > s.budget_bytes]
        disks = [s for s in self.samples if s.disk_bytes > s.disk_max_bytes]
        accepted = self.counters.get("accepted_requests", 0.0)
        by_engine = sum(self.counters.get(name, 0.0) for name in ENGINE_ENDS)
        found = {
            f"{by_end['lost']} requests had no end": by_end["lost"],
            f"{by_end['failed']} requests failed": by_end["failed"],
            f"{self.num_sent} sent, {sum(by_end.values())} ended": self.num_sent - sum(by_end.values()),
            f"the engine took {accepted:.0f} and ended {by_engine:.0f}": accepted - by_engine,
            f"{last.num_running} still run, {last.num_waiting} wait": last.num_running + last.num_waiting,
            f"{last.pages_reserved} pages are still reserved": last.pages_reserved,
            f"{last.running_bytes} bytes are held by conversations that ended": last.running_bytes,
            f"over the pool's budget in {len(budgets)} samples": len(budgets),
            f"over the disk's budget in {len(disks)} samples": len(disks),
        }
        return [text for text, wrong in found.items() if wrong]


def table(report: SoakReport) -> str:
    """The report as text."""
    first, last = report.samples[0], report.samples[-1]
    duration_s = last.time_s - first.time_s
    by_end, counters = report.num_by_end, report.counters
    kinds = sorted({kind for kind, _ in report.ends})
    rows = [["requests", *ENDS]]
    rows += [[kind, *(str(report.ends[kind, end]) for end in ENDS)] for kind in kinds]
    rows.append(["all", *(str(by_end[end]) for end in ENDS)])
    lines = [_aligned(rows), ""]
    lines.append(
        f"sent {report.num_sent} in {duration_s:.0f} s = "
        + " + ".join(f"{number} {end}" for end, number in by_end.items())
    )
    ended = " + ".join(f"{counters.get(name, 0):.0f} {name.split('_')[0]}" for name in ENGINE_ENDS)
    lines.append(f"engine: accepted {counters.get('accepted_requests', 0):.0f} = {ended}")
    lines.append("server: " + ", ".join(f"{counters.get(name, 0):.0f} {name[5:]}" for name in HTTP_ENDS))
    statuses = ", ".join(f"{n} x {status}" for status, n in sorted(report.statuses.items())) or "none"
    lines.append(f"5xx: {statuses}; failed steps: {counters.get('failed_steps', 0):.0f}")
    middle = report.samples[int(len(report.samples) * WARM_UP)]
    looked = (("at first", first), ("warm", middle), ("last under load", report.samples[-2]), ("at the end", last))
    lines += ["", _aligned([["", "MiB", "descriptors", "threads", "pages", "reserved", "KV MiB", "running", "disk MiB"]]
        + [[name, *_figures(sample)] for name, sample in looked])]  # fmt: skip
    lines += ["", _budgets(report.samples), _growth(report.growth)]
    lines += [f"BROKEN: {text}" for text in report.broken]
    lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _figures(s: Sample) -> list[str]:
    mib = [f"{n / MIB:.1f}" for n in (s.rss_bytes, s.held_bytes, s.running_bytes, s.disk_bytes)]
    return [mib[0], str(s.num_descriptors), str(s.num_threads), str(s.pages_used), str(s.pages_reserved), *mib[1:]]


def _budgets(samples: Sequence[Sample]) -> str:
    held, disk = max(s.held_bytes for s in samples), max(s.disk_bytes for s in samples)
    budget, disk_max = samples[-1].budget_bytes, samples[-1].disk_max_bytes
    return (
        f"most held: {held / MIB:.1f} of {budget / MIB:.1f} MiB, on disk {disk / MIB:.1f} of {disk_max / MIB:.1f} MiB; "
        f"most descriptors {max(s.num_descriptors for s in samples)}, threads {max(s.num_threads for s in samples)}"
    )


def _growth(found: Slope | None) -> str:
    if found is None:
        return "memory: not known (no process on this machine, or too short)"
    per_h, error = found.per_s * 3600 / MIB, found.error_per_s * 3600 / MIB
    verdict = "grows" if found.is_growth else "within noise (two standard errors) of no growth"
    return f"memory after the first {WARM_UP:.0%}: {per_h:+.1f} +- {error:.1f} MiB/h, {verdict}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
