"""How requests end: what is counted, and what is said of a failure."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.request import AbortEvent, EngineEvent, ErrorEvent
from server.memory.limits import is_out_of_memory


@dataclass(frozen=True)
class Failure:
    """What is told of an exception, without the exception, whose frames hold arrays.

    Attributes:
        no_memory: an allocation was refused: no fault, and a shorter request may find room. Why, for the caller.
    """

    no_memory: str | None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Of a step or a start that raised `error`."""
        if is_out_of_memory(error):
            return cls(f"there was no memory for this request ({error}); shorten it, or retry when less is running")
        return cls(None)

    def event(self, request_id: str) -> ErrorEvent:
        """The last event of a request that failed so."""
        if self.no_memory is not None:
            return ErrorEvent(request_id, self.no_memory, "insufficient_memory", 503)
        return engine_error(request_id)


def engine_error(request_id: str) -> ErrorEvent:
    """A failure that callers cannot do anything about: its cause is in the log, under the request's id."""
    message = f"the engine failed on this request; the server's log has the details, under {request_id}"
    return ErrorEvent(request_id, message, "engine_error")


def ended_as(event: EngineEvent | None) -> str:
    """The counter of requests that end with this event (None: answered); every accepted request is in one of four."""
    if isinstance(event, AbortEvent):
        return "aborted_requests"
    if isinstance(event, ErrorEvent):
        return "failed_requests" if event.code == "engine_error" else "refused_requests"
    return "finished_requests"
