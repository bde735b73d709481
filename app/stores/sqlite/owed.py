"""Owed invalidations, and which features any process of this database caches.

`any_owed` looks on the caller's thread, on a connection of its own: a hop to another thread would cost more than the
look, and a read may not begin before it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path

from app.errors import StoreUnavailable
from app.features.registry import Registry
from app.profiles.ports import Owed
from app.stores.sqlite.connection import connect, unavailable
from app.stores.sqlite.database import Database

SELECT_DATA_VERSION = "PRAGMA data_version"
SELECT_ANY_OWED = "SELECT EXISTS (SELECT 1 FROM owed_invalidations)"
SELECT_OWED = "SELECT id, user_id FROM owed_invalidations ORDER BY id LIMIT ?"
SELECT_FEATURES = "SELECT DISTINCT feature FROM feature_keys"
INSERT_OWED = "INSERT INTO owed_invalidations (user_id, owed_at_ms) SELECT value, ? FROM json_each(?)"
DELETE_OWED = "DELETE FROM owed_invalidations WHERE id IN (SELECT value FROM json_each(?))"
UPSERT_FEATURE = """
INSERT INTO feature_keys (subject, feature, announced_at_ms) VALUES (?, ?, ?)
ON CONFLICT (subject, feature) DO UPDATE SET announced_at_ms = excluded.announced_at_ms
"""


class SqliteOwedInvalidations:
    """Implements `app.profiles.ports.OwedInvalidations`. Close it when done."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._look = self._connect(database.path)
        self._version = -1
        self._owed = True

    def any_owed(self) -> bool:
        """Look now. Raises `StoreUnavailable`."""
        try:
            (version,) = self._look.execute(SELECT_DATA_VERSION).fetchone()
            if version != self._version:  # some connection committed since the last look
                (owed,) = self._look.execute(SELECT_ANY_OWED).fetchone()
                self._owed, self._version = bool(owed), version
        except sqlite3.Error as error:
            self._version = -1
            raise unavailable(error) from error
        return self._owed

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        """Committed when this returns."""
        users = json.dumps(sorted(user_ids))
        await self._database.write(lambda connection: connection.execute(INSERT_OWED, (now_ms, users)))

    async def pending(self, limit: int) -> tuple[list[Owed], frozenset[str]]:
        """Oldest first, with every announced feature."""

        def work(connection: sqlite3.Connection) -> tuple[list[Owed], frozenset[str]]:
            rows = [Owed(*row) for row in connection.execute(SELECT_OWED, (limit,)).fetchall()]
            return rows, frozenset(name for (name,) in connection.execute(SELECT_FEATURES).fetchall())

        return await self._database.read(work)

    async def settled(self, ids: Sequence[int]) -> None:
        """Forget these rows."""
        await self._database.write(lambda connection: connection.execute(DELETE_OWED, (json.dumps(ids),)))

    def close(self) -> None:
        """Close the connection kept for looking."""
        self._look.close()

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        try:
            return connect(path, read_only=True, busy_timeout_s=0.02)
        except sqlite3.Error as error:
            raise StoreUnavailable(str(error)) from error


async def announce(database: Database, registry: Registry, now_ms: int) -> None:
    """Record which features this process will cache, before it caches any.

    Ingest drops the union over all processes. Without it, during a deploy, a process of the old release would take
    an event and leave alone the keys of a feature that only the new release knows.
    """
    rows = [(subject, entry.name, now_ms) for entry in registry for subject in entry.invalidated_by]
    await database.write(lambda connection: connection.executemany(UPSERT_FEATURE, rows))
