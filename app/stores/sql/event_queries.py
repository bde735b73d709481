"""Queries of the event log: one user's newest events and activity, and the newest events of all users."""

from __future__ import annotations

from app.events.ports import ActivityCount, TracedEvent
from app.features.clock import DAY_MS
from app.features.events import KNOWN_SUBJECTS
from app.profiles.ports import RecentEvent
from app.stores.sql.database import SqlRepository
from app.stores.sql.event_log import EVENT_COLUMNS, EVENT_JOINS, logged_event

# Each subject comes sorted from its index and stops at the LIMIT, however many events the user has.
_NEWEST_SEQS = "\n    UNION ALL\n".join(
    f"""    SELECT seq FROM (
        SELECT seq FROM event_log WHERE user_id = :user AND subject = '{subject}' ORDER BY seq DESC LIMIT :limit
    ) AS newest"""
    for subject in sorted(KNOWN_SUBJECTS)
)
SELECT_NEWEST_TRACED = f"""
SELECT {EVENT_COLUMNS}, COALESCE(letter.attempts, outbox.attempts, 0),
    log.occurred_at_ms, log.claimed_at_ms, outbox.seq IS NULL, letter.id
FROM (
{_NEWEST_SEQS}
    ORDER BY seq DESC LIMIT :limit
) AS newest
JOIN event_log AS log ON log.user_id = :user AND log.seq = newest.seq
{EVENT_JOINS}
LEFT JOIN outbox ON outbox.user_id = log.user_id AND outbox.seq = log.seq
LEFT JOIN dead_letters AS letter ON letter.seq = log.seq
ORDER BY log.seq DESC
"""
_WITHIN = f"user_id = :user AND occurred_at_ms > :until - :days * {DAY_MS} AND occurred_at_ms <= :until"
_PLACE = (
    f"(:until - occurred_at_ms) / {DAY_MS} AS days_ago, "
    "((occurred_at_ms + utc_offset_min * 60000) / 3600000) % 24 AS local_hour"
)
SELECT_ACTIVITY = f"""
SELECT {_PLACE}, 'served' AS kind, COUNT(*) FROM tip_views WHERE {_WITHIN} GROUP BY days_ago, local_hour
UNION ALL
SELECT {_PLACE}, action AS kind, COUNT(*) FROM tip_feedback WHERE {_WITHIN} GROUP BY days_ago, local_hour, kind
"""
SELECT_RECENT = "SELECT seq, user_id, received_at_ms FROM event_log WHERE seq > ? ORDER BY seq DESC LIMIT ?"
SELECT_ANY_UNCONSUMED = "SELECT EXISTS (SELECT 1 FROM outbox WHERE user_id = ? AND seq > ?)"


class SqlEventQueries(SqlRepository):
    """Queries the event log. Implements `app.profiles.ports.RecentEvents` and `app.events.ports.UserEvents`."""

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        rows = await self._database.rows(SELECT_NEWEST_TRACED, {"user": user_id, "limit": limit})
        return [
            TracedEvent(logged_event(row[:-4]), counted_at_ms, claimed_at_ms, bool(consumed), letter_id)
            for row in rows
            for counted_at_ms, claimed_at_ms, consumed, letter_id in [row[-4:]]
        ]

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        rows = await self._database.rows(SELECT_ACTIVITY, {"user": user_id, "until": until_ms, "days": days})
        return [ActivityCount(*row) for row in rows]

    async def since(self, seq: int, limit: int) -> list[RecentEvent]:
        return [RecentEvent(*row) for row in await self._database.rows(SELECT_RECENT, (seq, limit))]

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        return bool(await self._database.value(SELECT_ANY_UNCONSUMED, (user_id, after_seq)))
