"""Responses that were kept, in one SQLite file: bounded in number and bytes, the oldest go first."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from server.errors import StorageError
from server.system.database import is_damage
from server.system.json_file import parse_json

Json = dict[str, Any]
T = TypeVar("T")
log = logging.getLogger(__name__)

STORE_FILE = "responses.sqlite3"
# Ids of this server, and whatever else SQLite can compare as text.
_ID = re.compile(r"[\x21-\x7e]{1,256}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    previous_id TEXT,
    response TEXT NOT NULL,
    input TEXT NOT NULL,
    num_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS items (
    id TEXT NOT NULL,
    seq INTEGER NOT NULL REFERENCES responses (seq) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
CREATE INDEX IF NOT EXISTS items_by_seq ON items (seq);
"""
_DROP_OLDEST = """
DELETE FROM responses WHERE seq IN (
    SELECT seq FROM (
        SELECT seq, row_number() OVER newest AS number, sum(num_bytes) OVER newest AS total
        FROM responses WINDOW newest AS (ORDER BY seq DESC)
    ) WHERE number > ? OR total > ?
)
"""


@dataclass(frozen=True)
class KeptResponse:
    """A response, and the input items of its request (not those of the responses before it)."""

    response: Json
    input: tuple[Json, ...]

    @property
    def items(self) -> tuple[Json, ...]:
        """What the conversation gained: input, then output."""
        return (*self.input, *self.response["output"])


class RunningResponse(Protocol):
    """A response under way, as other requests see it."""

    @property
    def status(self) -> str:
        """Where it stands; "in_progress" while it can be cancelled."""

    def response(self) -> Json:
        """The response object so far."""

    def cancelled(self) -> Json:
        """Mark it as cancelled; the response object."""


class ResponseStore:
    """The file, used from one thread of its own: no method waits for the disk on the event loop.

    The file is readable by its owner only. It is opened at its first use.
    """

    def __init__(self, path: Path, max_responses: int, max_bytes: int) -> None:
        self._path = path
        self._limits = (max_responses, max_bytes)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
        self._connection: sqlite3.Connection | None = None

    def keep(self, response: Json, items: Sequence[Json]) -> None:
        """Write a response that is over; what is asked for afterwards sees it. A disk that refuses is logged."""
        self._executor.submit(self._keep, response, tuple(items))

    async def get(self, response_id: str) -> KeptResponse | None:
        """The response of this id."""
        return await self._run(lambda db: _read(db, "SELECT * FROM responses WHERE id = ?", response_id))

    async def chain(self, response_id: str) -> list[KeptResponse] | None:
        """The response and all those before it, oldest first; None when one of them is not kept."""
        return await self._run(lambda db: _chain(db, response_id))

    async def item(self, item_id: str) -> Json | None:
        """The latest item of this id, of any response."""
        query = "SELECT r.* FROM items JOIN responses r USING (seq) WHERE items.id = ? ORDER BY seq DESC"
        kept = await self._run(lambda db: _read(db, query, item_id))
        return None if kept is None else next((item for item in kept.items if item.get("id") == item_id), None)

    async def delete(self, response_id: str) -> bool:
        """Forget a response; whether there was one."""

        def delete(db: sqlite3.Connection) -> bool:
            with db:
                num_deleted = db.execute("DELETE FROM responses WHERE id = ?", (response_id,)).rowcount
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return num_deleted > 0

        return bool(_ID.fullmatch(response_id)) and await self._run(delete)

    def close(self) -> None:
        """Write what is queued and close the file."""
        self._executor.submit(self._close)
        self._executor.shutdown()

    async def _run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._sound, function)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"the kept responses in {self._path} cannot be used: {error}") from error

    def _sound(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """On the store's thread: what the function gives; where the file is damaged, of a new one."""
        try:
            return function(self._db())
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self._close()
            aside = self._path.with_name(f"{self._path.name}.damaged")
            os.replace(self._path, aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(f"{self._path.name}{suffix}").unlink(missing_ok=True)
            log.warning("%s is damaged (%s): it lies in %s now, and a new one is begun", self._path, error, aside)
            return function(self._db())

    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
            self._path.chmod(0o600)
            db = sqlite3.connect(self._path, timeout=10)
            try:
                # A deleted conversation leaves nothing in the file, and the file shrinks.
                for pragma in ("auto_vacuum = FULL", "journal_mode = WAL", "secure_delete = ON", "foreign_keys = ON"):
                    db.execute(f"PRAGMA {pragma}")
                db.executescript(_SCHEMA)
            except sqlite3.Error:
                db.close()
                raise
            self._connection = db
        return self._connection

    def _keep(self, response: Json, items: tuple[Json, ...]) -> None:
        told, given = json.dumps(response), json.dumps(items)
        row = (response["id"], response["previous_response_id"], told, given, len(told) + len(given))
        ids = {str(item.get("id")) for item in (*items, *response["output"])}

        def insert(db: sqlite3.Connection) -> None:
            with db:
                columns = "id, previous_id, response, input, num_bytes"
                seq = db.execute(f"INSERT INTO responses ({columns}) VALUES (?, ?, ?, ?, ?)", row).lastrowid
                rows = [(item_id, seq) for item_id in ids if _ID.fullmatch(item_id)]
                db.executemany("INSERT INTO items (id, seq) VALUES (?, ?)", rows)
                db.execute(_DROP_OLDEST, self._limits)

        try:
            self._sound(insert)
        except (OSError, sqlite3.Error):
            log.exception("the response %s could not be kept in %s", response["id"], self._path)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _read(db: sqlite3.Connection, query: str, key: str) -> KeptResponse | None:
    row = db.execute(query, (key,)).fetchone() if _ID.fullmatch(key) else None
    return None if row is None else _kept(row[3], row[4])


def _kept(response: str, items: str) -> KeptResponse | None:
    """A row's response; None, and a line in the log, where it is not what was written."""
    try:
        told, given = parse_json(response), parse_json(items)
        previous = told["previous_response_id"]
        if isinstance(previous, str | None) and all(isinstance(item, dict) for item in (*given, *told["output"])):
            return KeptResponse(told, tuple(given))
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("a kept response is damaged, and taken for none")
    return None


def _chain(db: sqlite3.Connection, response_id: str) -> list[KeptResponse] | None:
    kept: list[KeptResponse] = []
    at: str | None = response_id
    seen = set[str]()
    while at is not None:
        found = None if at in seen else _read(db, "SELECT * FROM responses WHERE id = ?", at)
        if found is None:
            return None
        seen.add(at)
        kept.append(found)
        at = found.response["previous_response_id"]
    return kept[::-1]
