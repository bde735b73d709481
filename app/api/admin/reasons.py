"""The reason of an admin's action, for the audit trail: in a form, in a JSON body, or in the query."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.request_parsing import body_as
from app.errors import Conflict, InvalidInput, Issue, Undecodable
from app.operations.audit import MAX_REASON, reason_problem

REASON_SCHEMA: dict[str, Any] = {"type": "string", "maxLength": MAX_REASON, "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}
Reason = Annotated[
    str, QueryParameter(description=f"Why, for the audit trail; up to {MAX_REASON} characters, no user's id.")
]


class ReasonRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Why something is done; in a body a reason stays out of the logs of proxies."""

    reason: Annotated[
        str,
        Meta(
            description="For the audit trail; no user's id.", extra_json_schema=REASON_SCHEMA, examples=["complaints"]
        ),
    ] = ""


# What a route that takes a reason says in its `opt`.
WITH_REASON: dict[str, Any] = {
    "scope": "admin",
    "schemas": {"reason": REASON_SCHEMA},
    "body": [ReasonRequest],
    "body_required": False,
}


async def reason_of(request: HttpRequest, of_query: str) -> str:
    """The reason that a request gives.

    Raises:
        Undecodable, InvalidInput: it is not allowed, in the query or in the body.
        Conflict: query and body give two.
    """
    if is_form(request):
        return _checked((await read_form(request)).get("reason"))
    if (wrong := reason_problem(of_query)) is not None:
        raise Undecodable("the reason is not allowed", [Issue("reason", wrong)])
    if not await request.body():
        return of_query
    reason = _checked((await body_as(request, ReasonRequest)).reason)
    if reason and of_query not in ("", reason):
        wrong = "must be the one in the query, if both are given"
        raise Conflict("nothing was changed: there are two reasons", [Issue("reason", wrong)])
    return reason or of_query


def _checked(reason: str) -> str:
    if (wrong := reason_problem(reason)) is not None:
        raise InvalidInput("the reason is not allowed", [Issue("reason", wrong)])
    return reason
