"""What the database says of work not done: the outbox, dead letters, owed invalidations, evidence set aside.

For metrics and readiness.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from app.stores.sqlite.database import Database
from app.stores.sqlite.states import SELECT_ASIDE_COUNT

SELECT_UNCONSUMED_COUNT = "SELECT COUNT(*), MIN(received_at_ms) FROM event_log WHERE consumed_at_ms IS NULL"
SELECT_LETTER_COUNT = "SELECT COUNT(*) FROM dead_letters"
SELECT_OWED_COUNT = "SELECT COUNT(*) FROM owed_invalidations"


class Backlog(NamedTuple):
    """Counts, and when the oldest unconsumed event arrived (None where there is none)."""

    unconsumed: int
    oldest_received_at_ms: int | None
    dead_letters: int
    owed: int
    unreadable: int


async def backlog(database: Database) -> Backlog:
    """Count now. Raises `StoreUnavailable`."""

    def work(connection: sqlite3.Connection) -> Backlog:
        unconsumed, oldest = connection.execute(SELECT_UNCONSUMED_COUNT).fetchone()
        (letters,) = connection.execute(SELECT_LETTER_COUNT).fetchone()
        (owed,) = connection.execute(SELECT_OWED_COUNT).fetchone()
        (unreadable,) = connection.execute(SELECT_ASIDE_COUNT).fetchone()
        return Backlog(unconsumed, oldest, letters, owed, unreadable)

    return await database.read(work)
