"""Stores the secret that signs the session cookies of admins, the sessions that were signed out, and the audit trail of
admin actions. Also stores the time of each API key's last use, so that unused keys can be found."""

from collections.abc import Collection, Mapping

from app.operations.audit import BEGUN, AuditEntry
from app.stores.sql.database import UPSERT_SERVICE, Connection, SqlRepository, writes

SELECT_SECRET = "SELECT value FROM service WHERE name = 'session_secret'"  # noqa: S105  # a statement
INSERT_ENDED = "INSERT INTO ended_sessions (session_id, expires_at_ms) VALUES (?, ?) ON CONFLICT DO NOTHING"
KEPT = 10_000
# The clock alone does not decide: if it were ahead for a moment, sessions that were signed out would be valid again.
DELETE_EXPIRED = f"""
DELETE FROM ended_sessions WHERE expires_at_ms <= ? AND expires_at_ms <= (
    SELECT expires_at_ms FROM ended_sessions ORDER BY expires_at_ms DESC LIMIT 1 OFFSET {KEPT - 1}
)
"""


class SqlSessions(SqlRepository):
    """The secret that signs cookies, and the signed-out sessions. Implements `app.api.auth.sessions.SessionRecords`."""

    _secret: str | None = None

    async def secret(self) -> str:
        """The secret that signs cookies. Cached, because it never changes while a process has the database open."""
        if self._secret is None:
            (self._secret,) = await self._database.row(SELECT_SECRET)  # fails if there is none
        return self._secret

    @writes(of=())
    def end(self, connection: Connection, session_id: str, expires_at_ms: int, now_ms: int) -> None:
        connection.execute(DELETE_EXPIRED, (now_ms,))
        connection.execute(INSERT_ENDED, (session_id, expires_at_ms))

    async def has_ended(self, session_id: str) -> bool:
        return await self._database.row("SELECT 1 FROM ended_sessions WHERE session_id = ?", (session_id,)) is not None


SELECT_USES = "SELECT SUBSTR(name, 10), value FROM service WHERE name LIKE 'key used %'"


class SqlKeyUses(SqlRepository):
    """The time at which each API key was used last. Every method raises `StoreUnavailable`."""

    async def note(self, names: Collection[str], now_ms: int) -> None:
        """Store `now_ms` as the time at which the API keys with these names were used last."""
        # Sorted: two processes that note the same keys must not wait for each other.
        rows = [(f"key used {name}", str(now_ms)) for name in sorted(names)]
        if rows:
            await self._database.write(lambda connection: connection.executemany(UPSERT_SERVICE, rows), of=())

    async def newest_ms(self) -> Mapping[str, int]:
        """The time of the last use in epoch milliseconds, by the name of the key."""
        return {name: int(value) for name, value in await self._database.rows(SELECT_USES)}


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
    """An entry is added, gets its outcome once, and is never deleted. Implements `app.operations.audit.AuditTrail`."""

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
