"""What the HTTP layer sees of the engine. `loop.EngineLoop` is the real one; tests use a fake with the same shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

from quant_core.cache.store import KVStore
from server.engine.background import IdleOnly
from server.engine.prefix_admin import PrefixAdmin
from server.engine.prefix_cache import PrefixStats
from server.engine.request import EngineEvent, GenerationRequest
from server.grammar.compile import GrammarCompiler
from server.model.embedder import Embedder
from server.prefix_disk.disk import DiskStats

T = TypeVar("T")
StateName = Literal["loading", "testing", "calibrating", "ready", "unready", "draining", "failed"]
STATES: tuple[StateName, ...] = get_args(StateName)


@dataclass(frozen=True)
class EngineState:
    """Where the engine stands: only "ready" takes requests.

    Attributes:
        state: "testing": the kernels' self-test; "unready": no KV store, and `detail` says why and what to do.
        detail: for people.
        progress: 0..1 of loading, testing or calibrating; None when unknown.
    """

    state: StateName
    detail: str = ""
    progress: float | None = None


@dataclass(frozen=True)
class LayerStatus:
    """How one layer's cache is held. `bytes_per_token` is measured at the first decode step, else None."""

    index: int
    kind: str
    packed: bool
    bytes_per_token: float | None


@dataclass(frozen=True)
class KVStatus:
    """The KV memory, from `nbytes` of evaluated arrays.

    Attributes:
        method: "vecinfer" or "fp16".
        held_bytes: by part: "codes" (pages of running conversations), "rings", "snapshots" (tails, and pages nothing
            else holds), "other" (layers with mlx-lm's cache).
        table_bytes: codebooks, transforms and means of live artifacts.
        pages_total, pages_used, pages_reserved: of the pool; reserved counts promised, not yet written pages.
        budget_bytes: the one byte budget.
        tokens_held: tokens of running conversations.
        fp16_bytes: what a float16 cache would hold for those tokens, in all layers.
        other_row_bytes: what each conversation holds at its fullest in layers that are not packed and do not grow with
            it: sliding windows, recurrent states.
        pages_by_request: pages of each running request's rows; one that several share counts with each.
    """

    method: str
    held_bytes: dict[str, int]
    table_bytes: int
    pages_total: int
    pages_used: int
    pages_reserved: int
    budget_bytes: int
    tokens_held: int
    fp16_bytes: int
    other_row_bytes: int
    layers: tuple[LayerStatus, ...] = ()
    pages_by_request: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineStatus(EngineState):
    """A snapshot of the engine for /admin/status, /readyz and /metrics, safe to read from any thread.

    `num_packed` are those of the running requests whose cache is packed; `codec` is what the active artifact's manifest
    says of its fit, with its window (empty: exact caches).
    `counters` only grow. "step_s_count", "step_s_sum" and "step_s_le_<bound>" (cumulative, bound in seconds as in
    "step_s_le_0.05") are the step-time histogram; any other key is exported as `vecinfer_engine_<key>_total`.
    """

    model_id: str = ""
    context_len: int = 0
    num_running: int = 0
    num_packed: int = 0
    num_waiting: int = 0
    last_token_age_s: float | None = None
    weight_bytes: int = 0
    active_artifact: str | None = None
    live_artifacts: tuple[str, ...] = ()
    backend: str = ""
    codec: Mapping[str, Any] = field(default_factory=dict)
    kv: KVStatus | None = None
    # The latest measurement with conversations running: what they took is still to be seen when they are over.
    kv_last_busy: KVStatus | None = None
    prefixes: PrefixStats | None = None
    disk: DiskStats | None = None
    counters: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """One model behind one MLX thread."""

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper; read-only use (encode, chat template) is allowed from any one other thread.

        Raises:
            NotReadyError: the model is not loaded yet.
        """

    @property
    def embedder(self) -> Embedder | None:
        """Makes text embeddings, on the MLX thread (through `call`); None: the server makes none.

        Raises:
            NotReadyError: the model is not loaded yet.
        """

    @property
    def grammars(self) -> GrammarCompiler:
        """What compiles a request's grammar before it is submitted, from any thread but an event loop's.

        Raises:
            NotReadyError: the model is not loaded yet.
        """

    @property
    def prefix_admin(self) -> PrefixAdmin:
        """What lists, clears and verifies stored prefixes, from threads that may wait.

        Raises:
            NotReadyError: the model is not loaded yet.
        """

    def status(self) -> EngineStatus:
        """The current state; cheap, never blocks on the MLX thread."""

    def submit(self, request: GenerationRequest) -> AsyncIterator[EngineEvent]:
        """Queue a request; its events follow, ending with exactly one terminal event.

        Raises (at the call, before the first event):
            ContextLengthError: prompt + max_tokens can never fit (context or pool).
            QueueFullError: the waiting queue is full; carries `retry_after_s`.
            NotReadyError: loading, calibrating, draining or failed.
        """

    def abort(self, request_id: str, reason: str) -> None:
        """End a request at any stage; its pages are free within one step. Unknown ids are ignored."""

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a short function on the MLX thread, between two steps."""

    def run_job(self, slices: Generator[Any, None, T], idle: IdleOnly | None = None) -> Future[T]:
        """Advance a generator on the MLX thread, one slice between decode steps, until it returns.

        With `idle` it runs only while no request and no other job does.
        Cancelling the future closes the generator (GeneratorExit at its current `yield`).
        """

    def activate(self, store: KVStore) -> None:
        """New requests use `store` from the next step on; MLX thread only (through `call`).

        Raises:
            ConflictError: two stores are live already.
            NotReadyError: no model is loaded.
        """
