"""Finding a user by the beginning of the id."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import msgspec
from litestar import Response, get
from litestar.params import QueryParameter

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.openapi.parameters import ID_PREFIX
from app.api.pages.negotiation import answer, prefers_page, redirect
from app.api.request_parsing import prefix_of
from app.features.ids import id_problem

FOUND_BY_DEFAULT, FOUND_MOST = 20, 100


class UsersFound(msgspec.Struct):
    """Ids that begin with `prefix`, in the order of their UTF-8 bytes; `more`: there are others."""

    prefix: str
    user_ids: list[str]
    more: bool


@get(
    "/admin/users",
    opt={
        "scope": "admin",
        "schemas": {"prefix": ID_PREFIX, "limit": {"type": "integer", "minimum": 1, "maximum": FOUND_MOST}},
    },
    tags=["Admin"],
    summary="Find users",
    description="Users with any event whose id begins with `prefix`, as it stands: no pattern, and a capital is "
    "another letter. In a browser, a page, or straight to the user whose id was given whole.",
    responses=problems(400, 401, 403, 503),
)
async def get_users(
    request: HttpRequest,
    prefix: Annotated[str, QueryParameter(description="How the id begins; empty: any.")] = "",
    limit: Annotated[
        int | None, QueryParameter(ge=1, le=FOUND_MOST, description=f"How many at most; {FOUND_BY_DEFAULT} without.")
    ] = None,
) -> Response[UsersFound]:
    """Some; in a browser an id that was typed whole leads to its user."""
    wanted, most = prefix_of(prefix), limit or FOUND_BY_DEFAULT
    found = await service_of(request).users.find(wanted, most + 1)
    body = UsersFound(wanted, found[:most], len(found) > most)
    if limit is None and found[:1] == [wanted] and prefers_page(request):
        return await redirect(request, f"/admin/users/{quote(wanted, safe='')}")
    return await answer(request, body, "users.html", most=FOUND_MOST, id_allowed=id_problem(wanted) is None)
