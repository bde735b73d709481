"""The audit trail in SQLite: entries are added and settled once, never deleted."""

from __future__ import annotations

import sqlite3

from app.operations.audit import BEGUN, AuditEntry, AuditFilter
from app.stores.sqlite.database import Database

NEWEST = 2**63 - 1
INSERT_AUDIT = "INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) VALUES (?, ?, ?, ?, ?)"
UPDATE_OUTCOME = "UPDATE audit_trail SET outcome = ? WHERE id = ? AND outcome = 'begun'"
SELECT_AUDIT = """
SELECT id, at_ms, actor, action, subject, outcome FROM audit_trail
WHERE id < :before
    AND (:actor IS NULL OR actor = :actor)
    AND (:action IS NULL OR action = :action)
    AND (:subject IS NULL OR subject = :subject)
ORDER BY id DESC LIMIT :limit
"""
# Of the newest: a look through a million entries takes 0.4 s, and the filters are worth 4 ms. The page itself needs no
# index: a filter that nothing matches looks through a million entries in 0.1 s, and admins act at a human's pace.
SELECT_ACTORS = """
SELECT DISTINCT actor FROM (SELECT actor FROM audit_trail ORDER BY id DESC LIMIT 10000) ORDER BY actor
"""
SELECT_ACTIONS = """
SELECT DISTINCT action FROM (SELECT action FROM audit_trail ORDER BY id DESC LIMIT 10000) ORDER BY action
"""


class SqliteAuditTrail:
    """Implements `app.operations.audit.AuditTrail`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = BEGUN) -> int:
        """Committed when it returns."""

        def work(connection: sqlite3.Connection) -> int:
            return connection.execute(INSERT_AUDIT, (at_ms, actor, action, subject, outcome)).lastrowid or 0

        return await self._database.write(work)

    async def settle(self, entry_id: int, outcome: str) -> None:
        """Once; a settled entry stays as it is."""
        await self._database.write(lambda connection: connection.execute(UPDATE_OUTCOME, (outcome, entry_id)))

    async def page(self, wanted: AuditFilter, before: int, limit: int) -> list[AuditEntry]:
        """By id, backwards."""
        parameters = {**wanted._asdict(), "before": before, "limit": limit}
        rows = await self._database.read(lambda connection: connection.execute(SELECT_AUDIT, parameters).fetchall())
        return [AuditEntry(*row) for row in rows]

    async def newest(self, limit: int) -> list[AuditEntry]:
        """The first page of all."""
        return await self.page(AuditFilter(), NEWEST, limit)

    async def actors(self) -> list[str]:
        """By name."""
        return await self._distinct(SELECT_ACTORS)

    async def actions(self) -> list[str]:
        """By name."""
        return await self._distinct(SELECT_ACTIONS)

    async def _distinct(self, statement: str) -> list[str]:
        rows = await self._database.read(lambda connection: connection.execute(statement).fetchall())
        return [name for (name,) in rows]
