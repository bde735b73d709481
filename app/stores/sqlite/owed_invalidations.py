"""What processes tell each other about the cache: what is owed to it, which server it is, which features are in it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence

from app.errors import RegistryError
from app.features.registry import Registry
from app.profiles.ports import OwedInvalidation
from app.stores.sqlite.data_version import DataVersion
from app.stores.sqlite.database import Database
from app.stores.sqlite.local_cache_epoch import UPSERT_RECALLS

SELECT_OWED = "SELECT id, user_id FROM owed_invalidations ORDER BY id LIMIT ?"
SELECT_FEATURES = "SELECT DISTINCT feature FROM feature_keys"
INSERT_OWED = "INSERT INTO owed_invalidations (user_id, owed_at_ms) SELECT value, ? FROM json_each(?)"
DELETE_OWED = "DELETE FROM owed_invalidations WHERE id IN (SELECT value FROM json_each(?))"
UPDATE_REGISTRATION = """
UPDATE cache_registration SET server = ?, generation = generation + 1 WHERE generation = ?
"""
SELECT_ANNOUNCED = "SELECT subject, feature FROM feature_keys"
INSERT_FEATURE = "INSERT OR IGNORE INTO feature_keys (subject, feature, announced_at_ms) VALUES (?, ?, ?)"


class SqliteOwedInvalidations:
    """Implements `app.profiles.ports.OwedInvalidations`. Close it when done."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.data_version = DataVersion(database.path)

    def any_owed(self) -> bool:
        """Whether anything is owed now. Raises `StoreUnavailable`."""
        return self.data_version.state().owed

    def disabled(self) -> str:
        """Which features are disabled, as of the last query; every process makes one at least once a second."""
        return self.data_version.last.disabled

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        """Committed when this returns."""
        users = json.dumps(sorted(user_ids))
        await self._database.write(lambda connection: connection.execute(INSERT_OWED, (now_ms, users)))

    async def pending(self, limit: int) -> tuple[list[OwedInvalidation], frozenset[str]]:
        """Oldest first, with every announced feature."""

        def work(connection: sqlite3.Connection) -> tuple[list[OwedInvalidation], frozenset[str]]:
            rows = [OwedInvalidation(*row) for row in connection.execute(SELECT_OWED, (limit,)).fetchall()]
            return rows, frozenset(name for (name,) in connection.execute(SELECT_FEATURES).fetchall())

        return await self._database.read(work)

    async def settled(self, ids: Sequence[int]) -> None:
        """Delete these rows, and make every process forget its local copies.

        The owed row of an erased user is the only record that the cached values are stale.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(DELETE_OWED, (json.dumps(ids),))
            connection.execute(UPSERT_RECALLS)

        await self._database.write(work)

    def close(self) -> None:
        """Close the connection of `data_version`."""
        self.data_version.close()

    @property
    def registration(self) -> SqliteRegistrationRepository:
        """The registration, on the same connection."""
        return SqliteRegistrationRepository(self._database, self.data_version)


class SqliteRegistrationRepository:
    """Implements `app.stores.valkey.server_registration.RegistrationRepository`."""

    def __init__(self, database: Database, data_version: DataVersion) -> None:
        self._database = database
        self._data_version = data_version

    def current(self) -> tuple[str | None, int]:
        """As of the last query by this process."""
        return self._data_version.last.server, self._data_version.last.generation or 0

    def look(self) -> tuple[str | None, int]:
        """Now. Raises `StoreUnavailable`."""
        state = self._data_version.state()
        return state.server, state.generation or 0

    async def register(self, server: str, after: int) -> None:
        """Compare and set, so that of two processes one wins and the other looks again."""
        await self._database.write(lambda connection: connection.execute(UPDATE_REGISTRATION, (server, after)))


async def announce(database: Database, registry: Registry, now_ms: int) -> None:
    """Record which features this process will cache, before it caches any.

    Ingest drops the union over all processes. Without it, during a deploy, a process of the old release would take
    an event and leave alone the keys of a feature that only the new release knows. What is recorded stays; where
    nothing is new nothing is written, so that a process can start while the disk is full or the database locked.
    Raises `StoreUnavailable`; `RegistryError` if an entry's subjects were not derived: no event would invalidate it.
    """
    for entry in registry:
        if not entry.invalidated_by:
            raise RegistryError(entry.name, "invalidated_by has not been derived; compile the registry first")
    known = await database.read(lambda connection: set(connection.execute(SELECT_ANNOUNCED).fetchall()))
    pairs = [(subject, entry.name) for entry in registry for subject in entry.invalidated_by]
    rows = [(*pair, now_ms) for pair in pairs if pair not in known]
    if rows:
        await database.write(lambda connection: connection.executemany(INSERT_FEATURE, rows))
