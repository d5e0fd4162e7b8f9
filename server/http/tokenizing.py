"""Work on the tokenizer's thread for a request: counted in the queue, dropped when its caller hangs up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from server.errors import QueueFullError
from server.http.auth import caller_of
from server.http.context import AppContext, app_context
from server.http.hang_up import unless_gone
from server.model.fair_thread import Slices

T = TypeVar("T")
RETRY_AFTER_S = 5


async def on_tokenizer(request: Request, work: Callable[[Any], Slices[T]], size: int) -> T:
    """The result of `work(tokenizer)`.

    Args:
        size: characters or token ids to work on, about: small work goes before large.

    Raises:
        QueueFullError: too many requests wait, for the tokenizer or for the engine.
        ClientGone: the caller hung up.
    """
    context = app_context(request)
    _check_room(context)
    return await unless_gone(request, context.prompts.run(work, caller=caller_of(request, context.keys), size=size))


def _check_room(context: AppContext) -> None:
    num_waiting, limit = context.prompts.num_waiting + context.engine.status().num_waiting, context.config.engine
    if num_waiting >= limit.max_waiting:
        raise QueueFullError(
            f"{num_waiting} requests are waiting, which is the limit (engine.max_waiting); retry later",
            retry_after_s=RETRY_AFTER_S,
        )
