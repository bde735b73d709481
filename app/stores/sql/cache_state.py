"""What the database records about caches: the users whose cache keys must still be deleted, the server that is
registered as the cache, and the *local cache epoch*, a counter. When the counter advances, every process clears its
local cache."""

import json
from collections.abc import Collection, Sequence

from app.features.ids import hash_slot
from app.profiles.ports import OwedInvalidation
from app.stores.sql.database import Connection, Database, SqlRepository, reads, writes

SELECT_LOCAL_CACHE_EPOCH = "SELECT COALESCE((SELECT value FROM service WHERE name = 'recalls'), '0')"
ADVANCE_LOCAL_CACHE_EPOCH = """
INSERT INTO service (name, value) VALUES ('recalls', '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(service.value AS BIGINT) + 1 AS TEXT)
"""
# Part of a statement: the slots of all rows. Each step seeks the next slot in the index, however many rows a slot has.
OWED_SLOTS = """
owed (slot) AS (
    SELECT MIN(slot) FROM owed_invalidations
    UNION ALL
    SELECT (SELECT MIN(slot) FROM owed_invalidations WHERE slot > owed.slot) FROM owed WHERE slot IS NOT NULL
)
"""
SELECT_OWED = """
SELECT id, user_id, slot FROM owed_invalidations
WHERE slot NOT IN (SELECT CAST(value AS BIGINT) FROM json_each(?)) ORDER BY id LIMIT ?
"""
SELECT_FEATURES = "SELECT DISTINCT feature FROM feature_keys"
INSERT_OWED = "INSERT INTO owed_invalidations (user_id, slot, owed_at_ms) VALUES (?, ?, ?)"
DELETE_OWED = "DELETE FROM owed_invalidations WHERE id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
UPDATE_REGISTRATION = "UPDATE cache_registration SET server = ?, generation = generation + 1 WHERE generation = ?"


def insert_owed(connection: Connection, user_ids: Collection[str], now_ms: int) -> None:
    """Record that the cache keys of these users must be deleted."""
    connection.executemany(INSERT_OWED, [(user_id, hash_slot(user_id), now_ms) for user_id in sorted(user_ids)])


class SqlOwedInvalidations(SqlRepository):
    """Cache-key deletions still to be made. Implements `app.profiles.ports.OwedInvalidations`."""

    async def any_owed(self) -> bool:
        return bool((await self._database.state.query()).owed)

    @writes(of=())
    def owe(self, connection: Connection, user_ids: Collection[str], now_ms: int) -> None:
        insert_owed(connection, user_ids, now_ms)

    @reads
    def pending(
        self, connection: Connection, limit: int, without: Collection[int] = ()
    ) -> tuple[list[OwedInvalidation], frozenset[str]]:
        rows = connection.execute(SELECT_OWED, (json.dumps(sorted(without)), limit)).fetchall()
        features = frozenset(name for (name,) in connection.execute(SELECT_FEATURES).fetchall())
        return [OwedInvalidation(*row) for row in rows], features

    @writes(of=())
    def settled(self, connection: Connection, ids: Sequence[int]) -> None:
        """Delete rows after their users' cache keys were deleted, and make every process clear its local cache. Local
        caches may hold values of erased users. Such a user has no events that show that the values are stale; only
        the deleted row showed it."""
        connection.execute(DELETE_OWED, (json.dumps(ids),))
        connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)


async def register_server(database: Database, server: str, after: int) -> None:
    """Register `server` under generation `after` + 1, if the present one is `after`. Raises `StoreUnavailable`."""
    await database.execute(UPDATE_REGISTRATION, (server, after))


async def clear_local_caches(database: Database) -> None:
    """Make every process clear its local cache before this cache is next read. Raises `StoreUnavailable`."""
    await database.execute(ADVANCE_LOCAL_CACHE_EPOCH)
