"""Counts of pending work and of faults in the data, for metrics, readiness and `profiles doctor`."""

from __future__ import annotations

from app.features.clock import DAY_MS
from app.operations.samples import Gauges
from app.stores.sql.database import Connection, Database

# Put before the spec's hash in rows that are set aside (`app.stores.sql.sufficient_statistics`).
ASIDE = "unreadable "
# A range of the index by spec, so that only rows set aside are read.
SELECT_ASIDE_COUNT = f"SELECT COUNT(*) FROM bandit_states WHERE spec_hash >= '{ASIDE}' AND spec_hash < '{ASIDE[:-1]}!'"
# Events ahead are counted up to a limit: after a day with a wrong clock there can be any number of them.
SELECT_BACKLOG = f"""
SELECT (SELECT COUNT(*) FROM outbox),
       (SELECT MIN(received_at_ms) FROM outbox),
       (SELECT COUNT(*) FROM dead_letters), (SELECT COUNT(*) FROM owed_invalidations), ({SELECT_ASIDE_COUNT}),
       (SELECT COUNT(*) FROM (SELECT 1 FROM event_log WHERE occurred_at_ms > ? LIMIT 10000) AS ahead)
"""
AHEAD_MS = 300_000
SELECT_UNKNOWN = "SELECT sent_by, events FROM unknown_decisions WHERE newest_ms >= ? ORDER BY sent_by"


async def backlog(database: Database, now_ms: int) -> Gauges:
    """Count the pending work and the faults in the database. Raises `StoreUnavailable`."""
    return await database.read(lambda connection: backlog_of(connection, now_ms))


def backlog_of(connection: Connection, now_ms: int) -> Gauges:
    row = connection.execute(SELECT_BACKLOG, (now_ms + AHEAD_MS,)).fetchone()
    outbox, oldest_ms, dead_letters, owed, unreadable, ahead = row
    age_s = 0.0 if oldest_ms is None else max(0, now_ms - oldest_ms) / 1000
    return Gauges(
        outbox=outbox,
        outbox_age_s=age_s,
        dead_letters=dead_letters,
        owed=owed,
        events_ahead=ahead,
        unreadable=unreadable,
    )


async def unknown_decisions(database: Database, now_ms: int) -> list[tuple[str, int]]:
    """Senders of events whose decision id is unknown for the event's user, each with the number of these events.

    A sender is left out after a day without such an event. The sender's count then restarts at 0. Raises
    `StoreUnavailable`.
    """
    return await database.rows(SELECT_UNKNOWN, (now_ms - DAY_MS,))
