"""Finding a user by the beginning of the id."""

from __future__ import annotations

from typing import Annotated

from litestar import get
from litestar.params import QueryParameter

from app.api.admin.overview_schemas import UsersFound
from app.api.context import HttpRequest, api_of
from app.api.documents import problems
from app.api.inputs import prefix_of

FOUND_BY_DEFAULT, FOUND_MOST = 20, 100


@get(
    "/admin/users",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Find users",
    description="Users with any event whose id begins with `prefix`, as it stands: no pattern, and a capital is "
    "another letter.",
    responses=problems(400, 401, 403, 503),
)
async def get_users(
    request: HttpRequest,
    prefix: Annotated[str, QueryParameter(description="How the id begins; empty: any.")] = "",
    limit: Annotated[int, QueryParameter(ge=1, le=FOUND_MOST, description="How many at most.")] = FOUND_BY_DEFAULT,
) -> UsersFound:
    """Some."""
    wanted = prefix_of(prefix)
    found = await api_of(request).users.find(wanted, limit + 1)
    return UsersFound(wanted, found[:limit], len(found) > limit)
