"""Admins' routes about rebuilds of many users."""

from __future__ import annotations

from litestar import Response, delete, get, post
from litestar.params import FromPath

from app.api.admin.rebuild_forms import SHOWN, blank, obstacles, rebuilds_page, start_from_form
from app.api.admin.rebuild_runs import cancel, found, start, status_of
from app.api.admin.schemas import RebuildList, RebuildOfAll, RebuildOfUsers, RebuildRequest, RebuildStatus
from app.api.auth.forms import is_form
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.pages.negotiation import answer, prefers_page
from app.api.request_parsing import body_as, check_ids
from app.errors import Conflict, InvalidInput, Issue


@post(
    "/admin/rebuilds",
    status_code=202,
    opt={"scope": "admin", "body": [RebuildOfAll, RebuildOfUsers]},
    tags=["Admin"],
    summary="Start a rebuild",
    description="Everyone eligible (`scope: all`), or up to 1,000 users. A worker carries it out; readers stay on "
    "their cached values meanwhile. 409 while one of the same scope runs.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
)
async def start_rebuild(request: HttpRequest) -> Response[RebuildStatus]:
    """Start one."""
    if is_form(request):
        return await start_from_form(request)
    wanted = await body_as(request, RebuildRequest)
    if (wanted.scope is None) == (wanted.user_ids is None):
        raise InvalidInput("say who", [Issue("$", 'give either {"scope": "all"} or {"user_ids": […]}')])
    check_ids(wanted.user_ids or [], "user_ids[{}]")
    asked = await start(request, wanted.user_ids, wanted.features)
    if not asked.new:
        raise Conflict(asked.refusal)
    return Response(status_of(service_of(request), asked.run), status_code=202)


@get(
    "/admin/rebuilds",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="List rebuilds",
    description=f"The newest {SHOWN}, newest first. A page for a browser.",
    responses=problems(400, 401, 403, 503),
)
async def get_rebuilds(request: HttpRequest) -> Response[RebuildList]:
    """Newest first."""
    service = service_of(request)
    if prefers_page(request):
        return await rebuilds_page(request, blank(service))
    body = RebuildList([status_of(service, run) for run in await service.rebuild_runs.newest(SHOWN)])
    return Response(body, headers={"Vary": "Accept"})


@get(
    "/admin/rebuilds/{run_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Watch a rebuild",
    description="A page for a browser, which follows the run.",
    responses=problems(400, 401, 403, 404, 503),
)
async def get_rebuild(request: HttpRequest, run_id: FromPath[str]) -> Response[RebuildStatus]:
    """One."""
    service = service_of(request)
    run = await found(service, run_id)
    hindered = await obstacles(service) if run.active and prefers_page(request) else []
    return await answer(request, status_of(service, run), "rebuild.html", obstacles=hindered)


@delete(
    "/admin/rebuilds/{run_id:str}",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Cancel a rebuild",
    description="It stops after the chunk it is at. One that has ended stays as it is: 409.",
    responses=problems(400, 401, 403, 404, 409, 503, 507),
)
async def cancel_rebuild(request: HttpRequest, run_id: FromPath[str]) -> RebuildStatus:
    """Cancel one."""
    return status_of(service_of(request), await cancel(request, run_id))
