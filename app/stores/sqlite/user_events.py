"""One user's events, for admins: the newest with what became of them, and how many when."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from app.events.ports import ActivityCount, TracedEvent
from app.features.clock import DAY_MS
from app.features.events import KNOWN_SUBJECTS
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import EVENT_COLUMNS, EVENT_JOINS, logged_event

# Each subject comes sorted from its index and stops at the LIMIT, however many events the user has.
_NEWEST_SEQS = "\n    UNION ALL\n".join(
    f"""    SELECT seq FROM (
        SELECT seq FROM event_log WHERE user_id = :user AND subject = '{subject}' ORDER BY seq DESC LIMIT :limit
    )"""
    for subject in sorted(KNOWN_SUBJECTS)
)
SELECT_NEWEST_TRACED = f"""
SELECT {EVENT_COLUMNS}, log.occurred_at_ms, log.claimed_at_ms, log.consumed_at_ms, letter.id
FROM (
{_NEWEST_SEQS}
    ORDER BY seq DESC LIMIT :limit
) AS newest
CROSS JOIN event_log AS log ON log.seq = newest.seq
{EVENT_JOINS}
LEFT JOIN dead_letters AS letter ON letter.seq = log.seq
ORDER BY log.seq DESC
"""
_WITHIN = "user_id = :user AND occurred_at_ms > :until - :days * 86400000 AND occurred_at_ms <= :until"
_PLACE = (
    "(:until - occurred_at_ms) / 86400000 AS days_ago, "
    "((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour"
)
SELECT_ACTIVITY = f"""
SELECT {_PLACE}, 'served' AS kind, COUNT(*) FROM tip_views WHERE {_WITHIN} GROUP BY days_ago, local_hour
UNION ALL
SELECT {_PLACE}, action AS kind, COUNT(*) FROM tip_feedback WHERE {_WITHIN} GROUP BY days_ago, local_hour, kind
"""
assert DAY_MS == 86_400_000  # as the statements have it


class SqliteUserEvents:
    """Implements the part of `app.api.dependencies.UserRecords` that is about events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        """By sequence number, newest first."""

        def work(connection: sqlite3.Connection) -> list[TracedEvent]:
            parameters = {"user": user_id, "limit": limit}
            return [_traced(row) for row in connection.execute(SELECT_NEWEST_TRACED, parameters).fetchall()]

        return await self._database.read(work)

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        """Counts over so many days of 24 hours that end at a moment, in no order; what is absent is 0."""
        parameters = {"user": user_id, "until": until_ms, "days": days}
        rows = await self._database.read(lambda connection: connection.execute(SELECT_ACTIVITY, parameters).fetchall())
        return [ActivityCount(*row) for row in rows]


def _traced(row: Sequence[object]) -> TracedEvent:
    return TracedEvent(logged_event(row[:-4]), *row[-4:])  # type: ignore[arg-type]  # columns of a STRICT table
