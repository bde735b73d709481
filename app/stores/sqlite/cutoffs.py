"""Up to which moment old events and decisions have been deleted. Implements `app.events.retention.Cutoffs`."""

from __future__ import annotations

from app.stores.sqlite.database import Database

SELECT_CUTOFF = "SELECT value FROM service WHERE name = 'pruned ' || ?"
UPSERT_CUTOFF = """
INSERT INTO service (name, value) VALUES ('pruned ' || ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""


class SqliteCutoffs:
    """Rows of the table `service`. Every method raises `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def cutoff(self, what: str) -> int | None:
        """The stored moment."""
        row = await self._database.read(lambda connection: connection.execute(SELECT_CUTOFF, (what,)).fetchone())
        return int(row[0]) if row is not None else None

    async def set_cutoff(self, what: str, cutoff_ms: int) -> None:
        """Committed when this returns."""
        await self._database.write(lambda connection: connection.execute(UPSERT_CUTOFF, (what, str(cutoff_ms))))
