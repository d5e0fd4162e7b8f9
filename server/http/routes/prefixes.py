"""/admin/prefixes: cached beginnings on disk."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from server.engine.prefix_misses import PrefixMiss
from server.engine.prompt_history import Tokens
from server.errors import StorageError
from server.http.context import app_context
from server.http.tokenizing import on_tokenizer
from server.model.fair_thread import Slices
from server.model.volatile_lines import kind_of_change
from server.prefix_disk.inspection import ListedPrefix

router = APIRouter(prefix="/admin")
T = TypeVar("T")
# Of the text at each side of a parting.
SHOWN_TOKENS = 24


@router.get("/prefixes")
async def list_prefixes(request: Request) -> dict[str, Any]:
    """Beginnings that outlive a restart, the latest used first."""
    admin = app_context(request).engine.prefix_admin
    return {"object": "list", "data": [_prefix(found) for found in await on_thread(admin.stored)]}


@router.delete("/prefixes")
async def clear_prefixes(request: Request) -> dict[str, Any]:
    """Delete all cached beginnings, in memory and on disk."""
    cleared = await on_thread(app_context(request).engine.prefix_admin.clear)
    return {"object": "prefixes", "deleted": True, "in_memory": cleared.num_in_memory, "on_disk": cleared.num_on_disk}


@router.post("/prefixes/verify")
async def verify_prefixes(request: Request) -> dict[str, Any]:
    """Read every stored object; what is damaged is told and dropped."""
    found = await on_thread(app_context(request).engine.prefix_admin.verify)
    return {
        "object": "verification",
        "objects": found.num_objects,
        "bytes": found.num_bytes,
        "damaged": found.lines,
    }


@router.get("/prefixes/misses")
async def list_misses(request: Request) -> dict[str, Any]:
    """The latest prompts of which much was read, and where each parts from the earlier prompt most like it."""
    misses = await on_thread(app_context(request).engine.prefix_admin.misses)

    def work(tokenizer: Any) -> Slices[list[dict[str, Any]]]:
        found = []
        for miss in misses:
            found.append(_miss(tokenizer, miss))
            yield
        return found

    return {"object": "list", "data": await on_tokenizer(request, work, 2 * SHOWN_TOKENS * len(misses))}


def _miss(tokenizer: Any, miss: PrefixMiss) -> dict[str, Any]:
    def text(tokens: Tokens) -> str:
        return str(tokenizer.decode(tokens.tolist()))

    at, parting = miss.num_shared, None
    if miss.earlier is not None and miss.reason == "parted":
        before = text(miss.prompt[max(0, at - SHOWN_TOKENS) : at])
        here, there = (text(tokens[at : at + SHOWN_TOKENS]) for tokens in (miss.prompt, miss.earlier))
        kind = kind_of_change(before, here, there)
        parting = {"before": before, "here": here, "there": there, "looks_like": kind}
    return {
        "request_id": miss.request_id,
        "object": "prefix_miss",
        "at": int(miss.at),
        "reason": miss.reason,
        "prompt_tokens": len(miss.prompt),
        "shared_tokens": miss.num_shared,
        "cached_tokens": miss.num_cached,
        "parting": parting,
    }


async def on_thread(work: Callable[[], T]) -> T:
    """The result of work that waits for the engine or the disk.

    Raises:
        FileNotFoundError: as the work does.
        StorageError: the disk does not take it.
    """
    try:
        return await asyncio.to_thread(work)
    except FileNotFoundError:
        raise
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the disk refuses: {error}") from error


def _prefix(found: ListedPrefix) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "prefix",
        "label": found.label,
        "tokens": found.num_tokens,
        "tail_bytes": found.tail_bytes,
        "page_bytes": found.page_bytes,
        "last_used": int(found.last_used),
    }
