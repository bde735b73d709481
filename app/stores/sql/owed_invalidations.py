"""Stores owed invalidations, which are deletions of cache keys still to be made, and which server is the cache."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from app.profiles.ports import OwedInvalidation, State
from app.stores.sql.database import Connection, Database
from app.stores.sql.local_cache_epoch import ADVANCE_LOCAL_CACHE_EPOCH

SELECT_OWED = "SELECT id, user_id FROM owed_invalidations ORDER BY id LIMIT ?"
SELECT_FEATURES = "SELECT DISTINCT feature FROM feature_keys"
INSERT_OWED = "INSERT INTO owed_invalidations (user_id, owed_at_ms) SELECT value, ? FROM json_each(?)"
DELETE_OWED = "DELETE FROM owed_invalidations WHERE id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
UPDATE_REGISTRATION = """
UPDATE cache_registration SET server = ?, generation = generation + 1 WHERE generation = ?
"""


class SqlOwedInvalidations:
    """Cache-key deletions still to be made. Implements `app.profiles.ports.OwedInvalidations`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.registration = SqlRegistrationRepository(database)

    async def any_owed(self) -> bool:
        return (await self._database.state.query()).owed

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        await self._database.execute(INSERT_OWED, (now_ms, json.dumps(sorted(user_ids))))

    async def pending(self, limit: int) -> tuple[list[OwedInvalidation], frozenset[str]]:
        def work(connection: Connection) -> tuple[list[OwedInvalidation], frozenset[str]]:
            owed = [OwedInvalidation(*row) for row in connection.execute(SELECT_OWED, (limit,)).fetchall()]
            return owed, frozenset(name for (name,) in connection.execute(SELECT_FEATURES).fetchall())

        return await self._database.read(work)

    async def settled(self, ids: Sequence[int]) -> None:
        """Delete rows after their users' cache keys were deleted, and make every process clear its local cache. For an
        erased user, whose events are gone, the row was the only sign that values in local caches are stale."""

        def work(connection: Connection) -> None:
            connection.execute(DELETE_OWED, (json.dumps(ids),))
            connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)

        await self._database.write(work, of=())


class SqlRegistrationRepository:
    """The registration of the cache server.

    Implements `app.stores.valkey.server_registration.RegistrationRepository`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def current(self) -> State:
        return self._database.state.last

    async def query(self) -> State:
        return await self._database.state.query()

    async def register(self, server: str, after: int) -> None:
        await self._database.execute(UPDATE_REGISTRATION, (server, after))
