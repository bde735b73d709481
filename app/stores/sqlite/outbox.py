"""What the database says of work not done: the outbox, dead letters, owed invalidations, evidence set aside.

For metrics and readiness.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from app.features.clock import DAY_MS
from app.stores.sqlite.database import Database
from app.stores.sqlite.states import SELECT_ASIDE_COUNT

SELECT_UNCONSUMED_COUNT = "SELECT COUNT(*), MIN(received_at_ms) FROM event_log WHERE consumed_at_ms IS NULL"
SELECT_LETTER_COUNT = "SELECT COUNT(*) FROM dead_letters"
# Counted up to a limit: after a day with a wrong clock there can be any number.
SELECT_AHEAD_COUNT = "SELECT COUNT(*) FROM (SELECT 1 FROM event_log WHERE occurred_at_ms > ? LIMIT 10000)"
AHEAD_MS = 300_000
SELECT_UNKNOWN = "SELECT sent_by, events FROM unknown_decisions WHERE newest_ms >= ? ORDER BY sent_by"
SELECT_OWED_COUNT = "SELECT COUNT(*) FROM owed_invalidations"


class Backlog(NamedTuple):
    """Counts, and when the oldest unconsumed event arrived (None where there is none)."""

    unconsumed: int
    oldest_received_at_ms: int | None
    dead_letters: int
    owed: int
    unreadable: int


async def events_ahead(database: Database, now_ms: int) -> int:
    """How many events are said to have occurred more than `AHEAD_MS` from now, at most 10,000.

    Raises `StoreUnavailable`.
    """

    def work(connection: sqlite3.Connection) -> int:
        (count,) = connection.execute(SELECT_AHEAD_COUNT, (now_ms + AHEAD_MS,)).fetchone()
        return int(count)

    return await database.read(work)


async def unknown_decisions(database: Database, now_ms: int) -> list[tuple[str, int]]:
    """Who sent events that name no decision of their user within the last day, and how many. As `events_ahead`."""
    return await database.read(lambda found: found.execute(SELECT_UNKNOWN, (now_ms - DAY_MS,)).fetchall())


async def backlog(database: Database) -> Backlog:
    """Count now. Raises `StoreUnavailable`."""

    def work(connection: sqlite3.Connection) -> Backlog:
        unconsumed, oldest = connection.execute(SELECT_UNCONSUMED_COUNT).fetchone()
        (letters,) = connection.execute(SELECT_LETTER_COUNT).fetchone()
        (owed,) = connection.execute(SELECT_OWED_COUNT).fetchone()
        (unreadable,) = connection.execute(SELECT_ASIDE_COUNT).fetchone()
        return Backlog(unconsumed, oldest, letters, owed, unreadable)

    return await database.read(work)
