"""Stores the moments before which old events and decisions have been deleted."""

from __future__ import annotations

from app.stores.sql.database import SqlRepository

SELECT_CUTOFF = "SELECT value FROM service WHERE name = 'pruned ' || ?"
UPSERT_CUTOFF = """
INSERT INTO service (name, value) VALUES ('pruned ' || ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""


class SqlCutoffs(SqlRepository):
    """Stores, for `events` and for `decisions`, the moment before which old rows are deleted. Implements
    `app.events.retention.Cutoffs`. Every method raises `StoreUnavailable`."""

    async def cutoff(self, what: str) -> int | None:
        row = await self._database.row(SELECT_CUTOFF, (what,))
        return int(row[0]) if row is not None else None

    async def set_cutoff(self, what: str, cutoff_ms: int) -> None:
        await self._database.execute(UPSERT_CUTOFF, (what, str(cutoff_ms)))
