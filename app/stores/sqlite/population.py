"""Who is eligible now and who was a while ago, in pages: what a survey of data quality walks over."""

from __future__ import annotations

import sqlite3

from app.profiles.ports import Member, Spans
from app.stores.sqlite.database import Database
from app.stores.sqlite.users import SELECT_COUNT_ELIGIBLE, SELECT_ELIGIBLE

# Whoever is eligible at either moment has an event since the earlier one's beginning, and the page is of those.
SELECT_MEMBERS = f"""
SELECT page.user_id,
    EXISTS (SELECT 1 FROM tip_views WHERE user_id = page.user_id AND occurred_at_ms >= :now_since)
    OR EXISTS (SELECT 1 FROM tip_feedback WHERE user_id = page.user_id AND occurred_at_ms >= :now_since),
    EXISTS (SELECT 1 FROM tip_views
            WHERE user_id = page.user_id AND occurred_at_ms >= :since AND occurred_at_ms <= :before)
    OR EXISTS (SELECT 1 FROM tip_feedback
               WHERE user_id = page.user_id AND occurred_at_ms >= :since AND occurred_at_ms <= :before)
FROM ({SELECT_ELIGIBLE}) AS page
ORDER BY page.user_id
"""
SELECT_OLDEST = "SELECT MIN(occurred_at_ms) FROM event_log"


class SqlitePopulation:
    """Implements `app.profiles.ports.Population`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def members(self, after: str, spans: Spans, limit: int) -> list[Member]:
        """A page."""
        parameters = {
            "after": after,
            "since": spans.before_since_ms,
            "before": spans.before_ms,
            "now_since": spans.since_ms,
            "limit": limit,
        }
        rows = await self._database.read(lambda connection: connection.execute(SELECT_MEMBERS, parameters).fetchall())
        return [Member(user_id, bool(now), bool(before)) for user_id, now, before in rows]

    async def count(self, spans: Spans) -> int:
        """How many in all."""
        return await self._number(SELECT_COUNT_ELIGIBLE, {"since": spans.before_since_ms}) or 0

    async def history_from_ms(self) -> int | None:
        """The oldest event's time."""
        return await self._number(SELECT_OLDEST, {})

    async def _number(self, statement: str, parameters: dict[str, int]) -> int | None:
        def work(connection: sqlite3.Connection) -> int | None:
            (number,) = connection.execute(statement, parameters).fetchone()
            return int(number) if number is not None else None

        return await self._database.read(work)
