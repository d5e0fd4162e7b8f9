"""Whether an SQLite file is damaged, which no waiting mends, or cannot be had just now."""

from __future__ import annotations

import sqlite3

# Of a file that is no database, or whose pages, tables or indexes are not what was made.
_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


def is_damage(error: sqlite3.Error) -> bool:
    """Whether it says so: not a full disk, a lock, or a folder that cannot be written."""
    # Errors of our own and of the module have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return isinstance(error, sqlite3.DatabaseError) and code & 0xFF in _DAMAGE
