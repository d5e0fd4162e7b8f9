"""Who may run: checks, and reservations before any prompt is read."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from quant_core.cache.store import KVStore, Reservation, Snapshot
from server.engine.events import EventSink
from server.engine.prefix_cache import FoundPrefix, PrefixCache, PrefixSpace
from server.engine.request import EngineEvent, GenerationRequest, is_terminal
from server.errors import BadRequestError, ContextLengthError


@dataclass(frozen=True)
class Limits:
    """What a request is checked against."""

    context_len: int
    vocab_size: int
    max_num_seqs: int


@dataclass(eq=False)
class Ticket:
    """A request that was accepted, and where its events go: exactly one terminal event, and nothing after it.

    `arrived_s` is on the clock of the steps' inputs.
    """

    request: GenerationRequest
    sink: EventSink
    arrived_s: float
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, event: EngineEvent) -> None:
        """Send an event, unless the request has ended. Any thread."""
        with self._lock:
            if not self._ended:
                self._ended = is_terminal(event)
                self.sink.put(event)


@dataclass(frozen=True)
class Admission:
    """Room for all rows of a request: one reservation per choice; the first one's covers the prompt."""

    reservations: tuple[Reservation, ...]
    found: FoundPrefix | None

    @property
    def cached(self) -> int:
        """Prompt tokens that come from a snapshot."""
        return self.found.length if self.found is not None else 0


def check_request(request: GenerationRequest, limits: Limits, store: KVStore) -> None:
    """Refuse what can never run.

    Raises:
        BadRequestError: an empty prompt, more choices than rows, token ids outside the vocabulary.
        ContextLengthError: prompt + max_tokens exceed the context, or the whole KV memory.
    """
    num_prompt = len(request.prompt)
    if num_prompt == 0:
        raise BadRequestError("the prompt is empty; it must have at least one token", param="prompt")
    least = 1 if request.sampling.prompt_logprobs is None else 0
    if request.max_tokens < least or request.n < 1:
        raise BadRequestError("max_tokens and n must be at least 1", param="max_tokens")
    if request.n > limits.max_num_seqs:
        raise BadRequestError(
            f"n is {request.n}, but this server runs at most {limits.max_num_seqs} choices at once", param="n"
        )
    _check_ids(request, limits.vocab_size)
    num_tokens = num_prompt + request.max_tokens
    if num_tokens > limits.context_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}: {num_tokens} in all, but the "
            f"context is {limits.context_len} tokens; shorten the messages or lower max_tokens",
            param="messages",
        )
    if not store.can_ever_fit(num_tokens, request.n):
        raise ContextLengthError(
            f"{request.n} x {num_tokens} tokens (prompt {num_prompt}, max_tokens {request.max_tokens}) do not fit the "
            "KV memory of this server even when nothing else runs; shorten the messages, lower max_tokens or n, or "
            "raise kv_cache.pool_bytes",
            param="messages",
        )


def _check_ids(request: GenerationRequest, vocab_size: int) -> None:
    given: dict[str, Iterable[int]] = {
        "prompt": request.prompt,
        "logit_bias": request.sampling.logit_bias,
        "stop_token_ids": request.stop_token_ids,
    }
    for param, ids in given.items():
        wrong = next((t for t in ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise BadRequestError(f"token id {wrong} is outside the vocabulary (0 to {vocab_size - 1})", param=param)


def reserve(request: GenerationRequest, store: KVStore, prefixes: PrefixCache) -> Admission | None:
    """Admission room for all choices, dropping old snapshots if that is what it takes; None: not now.

    The prompt is reserved once: the other choices fork from the first at its end.
    """
    found = find_prefix(request, store, prefixes)
    while True:
        snapshot = found.snapshot if found is not None else None
        reservations = _reserve_rows(request, store, snapshot)
        if reservations is not None:
            return Admission(reservations, found)
        if store.may_fit(len(request.prompt) + request.max_tokens, request.n, snapshot) and prefixes.evict(
            "memory", spare=snapshot
        ):
            continue
        if found is None or not store.may_fit(len(request.prompt) + request.max_tokens, request.n):
            return None
        found = None


def prefix_space(request: GenerationRequest, store: KVStore) -> PrefixSpace:
    """Whose prefixes a request may find."""
    return PrefixSpace(store.artifact_id, request.cache_owner)


def find_prefix(request: GenerationRequest, store: KVStore, prefixes: PrefixCache) -> FoundPrefix | None:
    """The longest stored beginning of a prompt; none of one that is scored, since scores come from reading it."""
    if request.sampling.prompt_logprobs is not None:
        return None
    return prefixes.find(prefix_space(request, store), request.tokens)


def _reserve_rows(
    request: GenerationRequest, store: KVStore, snapshot: Snapshot | None
) -> tuple[Reservation, ...] | None:
    num_prompt = len(request.prompt)
    num_tokens = num_prompt + request.max_tokens
    reservations: list[Reservation] = []
    for index in range(request.n):
        reservation = (
            store.reserve(num_tokens, snapshot) if index == 0 else store.reserve_fork(num_prompt - 1, num_tokens)
        )
        if reservation is None:
            for given in reservations:
                given.release()
            return None
        reservations.append(reservation)
    return tuple(reservations)
