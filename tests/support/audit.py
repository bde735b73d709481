"""The newest entries of the audit trail."""

from app.operations.audit import AuditEntry
from app.stores.sql.access import SqlAuditTrail

NEWEST = 2**63 - 1


async def newest_entries(trail: SqlAuditTrail, limit: int = 10) -> list[AuditEntry]:
    return await trail.page(NEWEST, limit)
