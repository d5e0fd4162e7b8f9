"""Prometheus metrics in a registry of their own: what HTTP sees as it happens, the engine when it is scraped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.interface import STATES, Engine, EngineStatus, KVStatus
from server.engine.prefix_cache import EVICTION_CAUSES, PrefixStats
from server.engine.request import FinishEvent
from server.prefix_disk.disk import DiskStats

Outcome = Literal["ok", "error", "aborted", "rejected"]

STEP_BUCKET = "step_s_le_"
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 1.5, 3, 10)


class Metrics:
    """The registry and the metrics that HTTP feeds."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.requests = self._counter("vecinfer_requests", "Generation requests by how they ended", "route", "outcome")
        self.errors = self._counter("vecinfer_http_errors", "Error answers by HTTP status", "status")
        self.prompt_tokens = self._counter("vecinfer_prompt_tokens", "Prompt tokens of finished requests")
        self.cached_tokens = self._counter("vecinfer_cached_tokens", "Prompt tokens resumed from a snapshot")
        self.generated_tokens = self._counter("vecinfer_generated_tokens", "Tokens generated")
        self.first_token_s = self._histogram(
            "vecinfer_time_to_first_token_seconds", "Request to first token", LATENCY_BUCKETS_S
        )
        self.gap_s = self._histogram("vecinfer_inter_token_seconds", "Between tokens of one choice", GAP_BUCKETS_S)
        self.request_s = self._histogram("vecinfer_request_seconds", "Whole requests", LATENCY_BUCKETS_S)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def start(self, route: str) -> Timing:
        """Follow a request that arrived now."""
        return Timing(self, route)

    def render(self) -> bytes:
        """The text form that Prometheus scrapes."""
        return generate_latest(self.registry)


class Timing:
    """One HTTP request's part in the metrics.

    Attributes:
        first_token_s, last_token_s: seconds from the request's arrival; None before a token.
        on_end: called once, with how the request ended.
    """

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._start = time.monotonic()
        self._last_token: dict[int, float] = {}
        self._ended = False
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.on_end: Callable[[Outcome], None] | None = None

    def token(self, choice: int, num_tokens: int) -> None:
        """`num_tokens` of a choice arrived together."""
        now = time.monotonic()
        self.last_token_s = now - self._start
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
            self._metrics.first_token_s.observe(self.first_token_s)
        elif choice in self._last_token:
            self._metrics.gap_s.observe(now - self._last_token[choice])
        self._last_token[choice] = now
        self._metrics.generated_tokens.inc(num_tokens)

    def finish(self, event: FinishEvent) -> None:
        """A choice ended; its prompt counts with the last one."""
        if event.is_last:
            self._metrics.prompt_tokens.inc(event.prompt_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)

    def end(self, outcome: Outcome) -> None:
        """The request ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(self._route, outcome).inc()
        if self.on_end is not None:
            self.on_end(outcome)
        if outcome != "rejected":
            self._metrics.request_s.observe(time.monotonic() - self._start)


class EngineCollector(Collector):
    """Reads the engine's status at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families that come from the engine."""
        status = self._engine.status()
        state = GaugeMetricFamily("vecinfer_engine_state", "1 for the current state", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(status.state == name))
        yield state
        yield _gauge("vecinfer_requests_running", "Requests being generated", status.num_running)
        yield _gauge("vecinfer_requests_packed", "Requests being generated in packed caches", status.num_packed)
        yield _gauge("vecinfer_requests_waiting", "Requests in the queue", status.num_waiting)
        if status.last_token_age_s is not None:
            yield _gauge("vecinfer_last_token_age_seconds", "Since the last token", status.last_token_age_s)
        if status.kv is not None:
            yield from _kv_families(status.kv)
        if status.prefixes is not None:
            yield from _prefix_families(status.prefixes)
        if status.disk is not None:
            yield from _disk_families(status.disk)
        yield from _counter_families(status)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _kv_families(kv: KVStatus) -> Iterator[Metric]:
    held = GaugeMetricFamily("vecinfer_kv_bytes", "KV memory held, nbytes of evaluated arrays", labels=["part"])
    for part, num_bytes in kv.held_bytes.items():
        held.add_metric([part], num_bytes)
    yield held
    pages = GaugeMetricFamily("vecinfer_pool_pages", "Pages of the pool", labels=["state"])
    for state, number in (("total", kv.pages_total), ("used", kv.pages_used), ("reserved", kv.pages_reserved)):
        pages.add_metric([state], number)
    yield pages
    yield _gauge("vecinfer_kv_table_bytes", "Codebooks, transforms and means of live artifacts", kv.table_bytes)
    yield _gauge("vecinfer_kv_budget_bytes", "The byte budget of the pool", kv.budget_bytes)
    yield _gauge("vecinfer_kv_fp16_bytes", "What float16 caches would hold for the same tokens", kv.fp16_bytes)
    yield _gauge("vecinfer_kv_tokens", "Tokens of running conversations", kv.tokens_held)


def _prefix_families(prefixes: PrefixStats) -> Iterator[Metric]:
    lookups = CounterMetricFamily(
        "vecinfer_prefix_lookups", "Admitted requests by whether a beginning was cached", labels=["result"]
    )
    lookups.add_metric(["hit"], prefixes.num_hits)
    lookups.add_metric(["miss"], prefixes.num_misses)
    yield lookups
    yield CounterMetricFamily(
        "vecinfer_prefix_saved_tokens", "Prompt tokens that were not read again", value=prefixes.num_saved_tokens
    )
    evicted = CounterMetricFamily("vecinfer_prefix_evictions", "Snapshots dropped", labels=["cause"])
    for cause in EVICTION_CAUSES:
        evicted.add_metric([cause], prefixes.num_evicted.get(cause, 0))
    yield evicted
    yield _gauge("vecinfer_prefix_snapshots", "Snapshots in memory", prefixes.num_snapshots)
    yield _gauge("vecinfer_prefix_snapshot_bytes", "Their bytes besides shared pages", prefixes.nbytes)


def _disk_families(disk: DiskStats) -> Iterator[Metric]:
    yield _gauge("vecinfer_prefix_disk_prefixes", "Prefixes on disk", disk.num_prefixes)
    yield _gauge("vecinfer_prefix_disk_bytes", "Bytes of prefixes on disk", disk.nbytes)
    yield _gauge("vecinfer_prefix_disk_budget_bytes", "What they may take", disk.max_bytes)
    for name, text, value in (
        ("reads", "Prefixes read from disk", disk.num_reads),
        ("read_bytes", "Bytes read from disk", disk.num_read_bytes),
        ("written_bytes", "Bytes written to disk", disk.num_written_bytes),
        ("evictions", "Prefixes dropped from disk for newer ones", disk.num_evicted),
        ("damaged", "Objects on disk that were not what was written", disk.num_damaged),
    ):
        yield CounterMetricFamily(f"vecinfer_prefix_disk_{name}", text, value=value)


def _counter_families(status: EngineStatus) -> Iterator[Metric]:
    counters = status.counters
    bounds = sorted((float(k.removeprefix(STEP_BUCKET)), v) for k, v in counters.items() if k.startswith(STEP_BUCKET))
    if "step_s_count" in counters:
        buckets = [(str(bound), count) for bound, count in bounds if bound != float("inf")]
        buckets.append(("+Inf", counters["step_s_count"]))
        total = counters.get("step_s_sum", 0.0)
        yield HistogramMetricFamily("vecinfer_step_seconds", "Engine steps", buckets=buckets, sum_value=total)
    for key, value in sorted(counters.items()):
        if not key.startswith("step_s_"):
            yield CounterMetricFamily(f"vecinfer_engine_{key}", f"Engine counter {key}", value=value)
