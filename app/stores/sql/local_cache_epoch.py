"""The *local cache epoch*, a counter in the database. When it advances, every process clears its local cache."""

from __future__ import annotations

from app.stores.sql.database import Database

SELECT_LOCAL_CACHE_EPOCH = "SELECT COALESCE((SELECT value FROM service WHERE name = 'recalls'), '0')"
ADVANCE_LOCAL_CACHE_EPOCH = """
INSERT INTO service (name, value) VALUES ('recalls', '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(service.value AS BIGINT) + 1 AS TEXT)
"""


async def clear_local_caches(database: Database) -> None:
    """Make every process clear its local cache before its next read from that cache. Raises `StoreUnavailable`."""
    await database.execute(ADVANCE_LOCAL_CACHE_EPOCH)
