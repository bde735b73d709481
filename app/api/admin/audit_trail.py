"""The audit trail: who did what, when, and what came of it."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import get
from litestar.params import QueryParameter

from app.api.admin.actors import user_hash
from app.api.admin.schemas import AuditLine, AuditPage
from app.api.context import HttpRequest, api_of
from app.api.documents import problems
from app.api.inputs import check_ids
from app.audit import AuditEntry, AuditFilter, state_of
from app.errors import InvalidInput, Issue
from app.features.clock import rfc3339

ENTRIES_PER_PAGE = 50
MAX_ROWID = 2**63 - 1


@get(
    "/admin/audit",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Read the audit trail",
    description="Every admin action, newest first. Users stand there as hashes only; `user_id` looks for one.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_audit(
    request: HttpRequest,
    before: Annotated[int, QueryParameter(ge=1, le=MAX_ROWID, description="Only entries with a lower id.")] = MAX_ROWID,
    actor: Annotated[str, QueryParameter(description="Only what this one did.")] = "",
    action: Annotated[str, QueryParameter(description="Only this action.")] = "",
    subject: Annotated[str, QueryParameter(description="Only what was done to this subject, as it is stored.")] = "",
    user_id: Annotated[str, QueryParameter(description="Only what was done to this user; instead of `subject`.")] = "",
) -> AuditPage:
    """A page of it."""
    api = api_of(request)
    wanted = AuditFilter(actor or None, action or None, _subject(subject, user_id))
    entries = await api.trail.page(wanted, before, ENTRIES_PER_PAGE + 1)
    shown = entries[:ENTRIES_PER_PAGE]
    more = shown[-1].id if len(entries) > ENTRIES_PER_PAGE else None
    return AuditPage([_line(entry) for entry in shown], more)


def _subject(subject: str, user_id: str) -> str | None:
    if not user_id:
        return subject or None
    if subject:
        raise InvalidInput("say whom", [Issue("user_id", "give either user_id or subject")])
    check_ids([user_id], "user_id")
    return user_hash(user_id)


def _line(entry: AuditEntry) -> AuditLine:
    state: Any = state_of(entry.outcome)
    return AuditLine(entry.id, rfc3339(entry.at_ms), entry.actor, entry.action, entry.subject, state, entry.outcome)
