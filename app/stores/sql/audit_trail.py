"""Stores the audit trail. An entry is added, gets its outcome once, and is never deleted."""

from __future__ import annotations

from app.operations.audit import BEGUN, AuditEntry
from app.stores.sql.database import SqlRepository

INSERT_AUDIT = "INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) VALUES (?, ?, ?, ?, ?) RETURNING id"
UPDATE_OUTCOME = "UPDATE audit_trail SET outcome = ? WHERE id = ? AND outcome = 'begun'"
# No index serves the filters: a filter that matches nothing scans a million entries in 0.1 s, and admins ask rarely.
SELECT_AUDIT = """
SELECT id, at_ms, actor, action, subject, outcome FROM audit_trail
WHERE id < :before
    AND (CAST(:actor AS TEXT) IS NULL OR actor = :actor)
    AND (CAST(:action AS TEXT) IS NULL OR action = :action)
    AND (CAST(:subject AS TEXT) IS NULL OR subject = :subject)
ORDER BY id DESC LIMIT :limit
"""


class SqlAuditTrail(SqlRepository):
    """The audit trail of admin actions. Implements `app.operations.audit.AuditTrail`."""

    async def begin(self, at_ms: int, actor: str, action: str, subject: str, outcome: str = BEGUN) -> int:
        row = (at_ms, actor, action, subject, outcome)
        return int(await self._database.write(lambda to: to.execute(INSERT_AUDIT, row).fetchone()[0], of=()))

    async def settle(self, entry_id: int, outcome: str) -> None:
        await self._database.execute(UPDATE_OUTCOME, (outcome, entry_id))

    async def page(
        self, before: int, limit: int, actor: str | None = None, action: str | None = None, subject: str | None = None
    ) -> list[AuditEntry]:
        parameters = {"before": before, "limit": limit, "actor": actor, "action": action, "subject": subject}
        return [AuditEntry(*row) for row in await self._database.rows(SELECT_AUDIT, parameters)]
