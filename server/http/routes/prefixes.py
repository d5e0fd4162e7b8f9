"""/admin/prefixes: cached beginnings on disk."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from server.errors import StorageError
from server.http.context import app_context
from server.prefix_disk.inspection import ListedPrefix

router = APIRouter(prefix="/admin")
T = TypeVar("T")


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
