"""Stores owed invalidations: deletions of cache keys that failed and are still to be made."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from app.profiles.ports import OwedInvalidation
from app.stores.sql.database import Connection
from app.stores.sql.local_cache_epoch import ADVANCE_LOCAL_CACHE_EPOCH
from app.stores.sqlite.data_version import DataVersion, SqliteRegistrationRepository
from app.stores.sqlite.database import SqliteDatabase

SELECT_OWED = "SELECT id, user_id FROM owed_invalidations ORDER BY id LIMIT ?"
SELECT_FEATURES = "SELECT DISTINCT feature FROM feature_keys"
INSERT_OWED = "INSERT INTO owed_invalidations (user_id, owed_at_ms) SELECT value, ? FROM json_each(?)"
DELETE_OWED = "DELETE FROM owed_invalidations WHERE id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"


class SqlOwedInvalidations:
    """Cache-key deletions still to be made. Implements `app.profiles.ports.OwedInvalidations`. Close it when done."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self.data_version = DataVersion(database.path)
        self.registration = SqliteRegistrationRepository(database, self.data_version)
        self.any_owed = self.data_version.any_owed
        self.disabled = self.data_version.disabled

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

    def close(self) -> None:
        self.data_version.close()
