"""The newest events, as an audit asks for them."""

from __future__ import annotations

import sqlite3

from app.profiles.ports import RecentEvent
from app.stores.sqlite.change_feed import SELECT_POSITION
from app.stores.sqlite.database import Database

SELECT_RECENT = "SELECT seq, user_id, received_at_ms FROM event_log WHERE seq > ? ORDER BY seq DESC LIMIT ?"
SELECT_ANY_UNCONSUMED = """
SELECT EXISTS (SELECT 1 FROM event_log WHERE user_id = ? AND seq > ? AND consumed_at_ms IS NULL)
"""


class SqliteRecentEvents:
    """Implements `app.profiles.ports.RecentEventEvents`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def since(self, seq: int, limit: int) -> list[RecentEvent]:
        """From the end of the primary key."""
        rows = await self._database.read(lambda connection: connection.execute(SELECT_RECENT, (seq, limit)).fetchall())
        return [RecentEvent(*row) for row in rows]

    async def newest_seq(self) -> int:
        """Of those that are kept."""

        def work(connection: sqlite3.Connection) -> int:
            (seq,) = connection.execute(SELECT_POSITION).fetchone()
            return int(seq)

        return await self._database.read(work)

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        """By the user's own part of an index."""

        def work(connection: sqlite3.Connection) -> bool:
            (found,) = connection.execute(SELECT_ANY_UNCONSUMED, (user_id, after_seq)).fetchone()
            return bool(found)

        return await self._database.read(work)
