"""What the database keeps of admins' sessions: its secret, and which sessions were signed out of."""

from __future__ import annotations

import sqlite3

from app.stores.sqlite.database import Database

SELECT_SECRET = "SELECT value FROM service WHERE name = 'session_secret'"  # noqa: S105  # no secret itself
SELECT_ENDED = "SELECT 1 FROM ended_sessions WHERE session_id = ?"
INSERT_ENDED = "INSERT OR IGNORE INTO ended_sessions (session_id, expires_at_ms) VALUES (?, ?)"
KEPT = 10_000
# The clock alone is not trusted: one that was ahead for a moment would make sessions valid again that have ended.
DELETE_EXPIRED = f"""
DELETE FROM ended_sessions WHERE expires_at_ms <= MIN(
    ?, (SELECT expires_at_ms FROM ended_sessions ORDER BY expires_at_ms DESC LIMIT 1 OFFSET {KEPT - 1})
)
"""


class SqliteSessions:
    """Implements `app.api.auth.sessions.SessionRecords`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._secret: str | None = None

    async def secret(self) -> str:
        """Read once: it does not change while a process has the database open."""
        if self._secret is None:
            row = await self._database.read(lambda connection: connection.execute(SELECT_SECRET).fetchone())
            self._secret = str(row[0])
        return self._secret

    async def end(self, session_id: str, expires_at_ms: int, now_ms: int) -> None:
        """Note it for as long as it would have lasted, and longer where there are few."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(DELETE_EXPIRED, (now_ms,))
            connection.execute(INSERT_ENDED, (session_id, expires_at_ms))

        await self._database.write(work)

    async def has_ended(self, session_id: str) -> bool:
        """One look by primary key."""
        row = await self._database.read(lambda connection: connection.execute(SELECT_ENDED, (session_id,)).fetchone())
        return row is not None
