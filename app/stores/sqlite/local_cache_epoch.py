"""Recalls: what makes every process forget the profiles that it keeps near (`app.profiles.online.local_cache`).

For what no event in the log tells of: a user is erased, values are rebuilt, a debt to the cache is settled. Who writes
such a thing recalls in the same transaction, or once the new values stand.
"""

from __future__ import annotations

from app.stores.sqlite.database import Database

SELECT_RECALLS = "SELECT COALESCE((SELECT value FROM service WHERE name = 'recalls'), '0')"
UPSERT_RECALLS = """
INSERT INTO service (name, value) VALUES ('recalls', '1')
ON CONFLICT (name) DO UPDATE SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT)
"""


async def recall(database: Database) -> None:
    """Committed when this returns; raises `StoreUnavailable`."""
    await database.write(lambda connection: connection.execute(UPSERT_RECALLS))
