"""The route and page of the audit trail: the recorded actions of admins and their outcomes."""

from typing import Annotated, Literal

import msgspec
from litestar import Response
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.admin import admin_get
from app.api.dependencies import HttpRequest
from app.api.openapi import MAX_ROWID, OPTIONAL_ID, ROWID
from app.api.pages.negotiation import answer, prefers_page
from app.api.request_parsing import check_ids
from app.errors import InvalidInput, Issue
from app.features.ids import user_hash
from app.features.views import view

ENTRIES_PER_PAGE = 50
State = Literal["done", "refused", "failed", "begun"]


class AuditLine(msgspec.Struct):
    """An action of an admin and its outcome."""

    id: int
    at: str
    actor: str
    action: str
    subject: Annotated[str, Meta(description="A user appears as a hash only.")]
    state: Annotated[State, Meta(description="`begun`: in progress, or its end could not be recorded.")]
    outcome: str


class AuditPage(msgspec.Struct):
    """A page of the audit trail, newest first. Continue with `before=next_before`, which is null on the last page."""

    entries: list[AuditLine]
    next_before: int | None


@admin_get(
    "/admin/audit",
    summary="Read the audit trail",
    description="Every action of an admin, newest first. The trail holds users as hashes only; `user_id` searches for "
    "the hash of a user. A page for a browser.",
    problems={422: "Or both `subject` and `user_id` are sent."},
)
async def get_audit(
    request: HttpRequest,
    before: Annotated[
        int, QueryParameter(ge=1, le=MAX_ROWID, description="Only entries with a lower id.", schema_extra=ROWID)
    ] = MAX_ROWID,
    actor: Annotated[str, QueryParameter(description="Only actions of this actor.")] = "",
    action: Annotated[str, QueryParameter(description="Only this action.")] = "",
    subject: Annotated[str, QueryParameter(description="Only actions on this subject, as it is stored.")] = "",
    user_id: Annotated[str, QueryParameter(description="Instead of `subject`.", schema_extra=OPTIONAL_ID)] = "",
) -> Response[AuditPage]:
    if user_id:
        if subject and not prefers_page(request):  # the form of the page repeats the subject of the last search
            raise InvalidInput("there are two subjects", [Issue("user_id", "give either user_id or subject")])
        check_ids([user_id], "user_id")
        subject = user_hash(user_id)
    wanted = {"actor": actor or None, "action": action or None, "subject": subject or None}
    entries = await request.service.audit_trail.page(before, ENTRIES_PER_PAGE + 1, **wanted)
    page = entries[:ENTRIES_PER_PAGE]
    more = page[-1].id if len(entries) > ENTRIES_PER_PAGE else None
    body = AuditPage([view(AuditLine, entry) for entry in page], more)
    return await answer(request, body, "audit.html", wanted=wanted, first=before == MAX_ROWID)
