"""Admins' routes. Each answers a browser with a page and other clients with JSON, and audits every change."""

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import delete, get, post
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.request_parsing import body_as
from app.errors import InvalidInput, Issue, Undecodable
from app.operations import audit

# The scope, the OpenAPI tag and the usual status of all admin routes.
ADMIN: dict[str, Any] = {"scope": "admin"}
admin_get = partial(get, opt=ADMIN, tags=["Admin"])
admin_post = partial(post, opt=ADMIN, tags=["Admin"], status_code=200)
admin_delete = partial(delete, opt=ADMIN, tags=["Admin"])
# For routes that only the forms of the pages use. Programs have another route for each.
form_post = partial(post, opt=ADMIN, include_in_schema=False, status_code=200)
REASON_SCHEMA = {"maxLength": audit.MAX_REASON, "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}
REASON_TEXT = f"Why, for the audit trail; up to {audit.MAX_REASON} characters, no user id."
Reason = Annotated[str, QueryParameter(description=REASON_TEXT, schema_extra=REASON_SCHEMA)]  # of DELETE


class ReasonRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The reason for a change. It is sent in the body so that access logs of proxies do not contain it."""

    reason: Annotated[str, Meta(description=REASON_TEXT, extra_json_schema=REASON_SCHEMA, examples=["complaints"])] = ""


# The options of a route that takes a reason.
WITH_REASON: dict[str, Any] = {
    "body": [ReasonRequest],
    "body_required": False,
    "problems": {409: "`detail` says why the change is not possible now."},
}


def audited(request: HttpRequest, action: str, subject: str) -> AbstractAsyncContextManager[audit.AuditedAction]:
    """Record an action of the caller in the audit trail: the intent on entry to the block, the outcome on exit."""
    service = request.service
    return audit.audited(service.audit_trail, service.clock.now_ms(), request.user.name, action, subject)


async def reason_of(request: HttpRequest) -> str:
    """The reason in the form or JSON body; empty if there is none. Raises the errors of `checked_reason`."""
    if is_form(request):
        return checked_reason((await read_form(request)).get("reason", ""))
    return checked_reason((await body_as(request, ReasonRequest)).reason) if await request.body() else ""


def checked_reason(reason: str, error: type[Undecodable | InvalidInput] = InvalidInput) -> str:
    """Return the reason. Raises `error` if it is too long or contains control characters."""
    if (problem := audit.reason_problem(reason)) is not None:
        raise error("the reason is not allowed", [Issue("reason", problem)])
    return reason
