"""Counts of pending work and of faults in the data, for metrics, readiness and `profiles doctor`."""

from __future__ import annotations

from typing import NamedTuple

from app.features.clock import DAY_MS
from app.stores.sql.database import Database
from app.stores.sql.sufficient_statistics import SELECT_ASIDE_COUNT

SELECT_BACKLOG = f"""
SELECT (SELECT COUNT(*) FROM outbox),
       (SELECT MIN(received_at_ms) FROM outbox),
       (SELECT COUNT(*) FROM dead_letters), (SELECT COUNT(*) FROM owed_invalidations), ({SELECT_ASIDE_COUNT})
"""
AHEAD_MS = 300_000
# Counted up to a limit: after a day with a wrong clock there can be any number of them.
SELECT_AHEAD_COUNT = "SELECT COUNT(*) FROM (SELECT 1 FROM event_log WHERE occurred_at_ms > ? LIMIT 10000) AS ahead"
SELECT_UNKNOWN = "SELECT sent_by, events FROM unknown_decisions WHERE newest_ms >= ? ORDER BY sent_by"


class Backlog(NamedTuple):
    """Counts of pending work.

    `oldest_received_at_ms`: the earliest arrival of an unconsumed event; None if there is none. `owed`: deletions of
    cache keys that failed and are still to be made. `unreadable`: users whose sufficient statistics were found damaged.
    """

    unconsumed: int
    oldest_received_at_ms: int | None
    dead_letters: int
    owed: int
    unreadable: int


async def backlog(database: Database) -> Backlog:
    """Count the pending work. Raises `StoreUnavailable`."""
    return Backlog(*await database.row(SELECT_BACKLOG))


async def events_ahead(database: Database, now_ms: int) -> int:
    """The number of events with a time more than `AHEAD_MS` after `now_ms`, at most 10,000."""
    (count,) = await database.row(SELECT_AHEAD_COUNT, (now_ms + AHEAD_MS,))
    return int(count)


async def unknown_decisions(database: Database, now_ms: int) -> list[tuple[str, int]]:
    """Senders of events whose decision id is unknown for the event's user, each with the number of these events.

    A sender is left out after a day without such an event. The sender's count then restarts at 0. Raises
    `StoreUnavailable`.
    """
    return await database.rows(SELECT_UNKNOWN, (now_ms - DAY_MS,))
