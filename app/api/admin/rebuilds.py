"""Admins' routes about rebuilds of many users."""

from __future__ import annotations

from litestar import delete, get, post
from litestar.params import FromPath

from app.api.admin.actors import audited, caller
from app.api.admin.schemas import RebuildList, RebuildRequest, RebuildStatus
from app.api.context import Api, HttpRequest, api_of, selected
from app.api.documents import problems
from app.api.inputs import body_as, check_ids
from app.errors import Conflict, InvalidInput, Issue, NotFound
from app.features.clock import rfc3339
from app.features.registry import indices
from app.profiles.rebuild_runs import RebuildRun, scope_of

SHOWN = 100


@post(
    "/admin/rebuilds",
    status_code=202,
    opt={"scope": "admin", "body": [RebuildRequest]},
    tags=["Admin"],
    summary="Start a rebuild",
    description="Everyone eligible (`scope: all`), or up to 1,000 users. A worker carries it out; readers stay on "
    "their cached values meanwhile. 409 while one of the same scope runs.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503),
)
async def start_rebuild(request: HttpRequest) -> RebuildStatus:
    """Start one."""
    api = api_of(request)
    wanted = await body_as(request, RebuildRequest)
    if (wanted.scope is None) == (wanted.user_ids is None):
        raise InvalidInput("say who", [Issue("$", 'give either {"scope": "all"} or {"user_ids": […]}')])
    user_ids = list(dict.fromkeys(wanted.user_ids)) if wanted.user_ids is not None else None
    check_ids(user_ids or [], "user_ids[{}]")
    mask = selected(api.registry, wanted.features)
    now_ms = api.clock.now_ms()
    run = RebuildRun(
        id=api.new_id(),
        scope=scope_of(user_ids),
        user_ids=user_ids,
        features=[api.registry.names[index] for index in indices(mask)],
        state="queued",
        done=0,
        total=await api.runner.total(user_ids),
        position="",
        requested_by=caller(request).name,
        created_at_ms=now_ms,
        started_at_ms=None,
        touched_at_ms=now_ms,
        finished_at_ms=None,
        error=None,
    )
    async with audited(request, "start rebuild", run.scope) as act:
        if (active := await api.book.open(run)) is not None:
            raise Conflict(
                f"rebuild {active.id} of the same scope is {active.state}, at {active.done} of {active.total}"
            )
        act.outcome = run.id
        await api.start_rebuild(run.id)
    return status_of(api, run)


@get(
    "/admin/rebuilds",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="List rebuilds",
    responses=problems(400, 401, 403, 503),
)
async def get_rebuilds(request: HttpRequest) -> RebuildList:
    """Newest first."""
    api = api_of(request)
    return RebuildList([status_of(api, run) for run in await api.book.newest(SHOWN)])


@get(
    "/admin/rebuilds/{run_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Watch a rebuild",
    responses=problems(400, 401, 403, 404, 503),
)
async def get_rebuild(request: HttpRequest, run_id: FromPath[str]) -> RebuildStatus:
    """One."""
    api = api_of(request)
    return status_of(api, await found(api, run_id))


@delete(
    "/admin/rebuilds/{run_id:str}",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Cancel a rebuild",
    description="It stops after the chunk it is at. One that has ended stays as it is: 409.",
    responses=problems(400, 401, 403, 404, 409, 503),
)
async def cancel_rebuild(request: HttpRequest, run_id: FromPath[str]) -> RebuildStatus:
    """Cancel one."""
    api = api_of(request)
    run = await found(api, run_id)
    async with audited(request, "cancel rebuild", run.scope) as act:
        if not await api.book.finish(run.id, "cancelled", api.clock.now_ms(), None):
            raise Conflict(f"rebuild {run.id} has ended: it is {(await found(api, run_id)).state}")
        act.outcome = run.id
    return status_of(api, await found(api, run_id))


async def found(api: Api, run_id: str) -> RebuildRun:
    """One run; raises `NotFound`."""
    run = await api.book.get(run_id)
    if run is None:
        raise NotFound(f"there is no rebuild {run_id}")
    return run


def status_of(api: Api, run: RebuildRun) -> RebuildStatus:
    """A run as it is shown."""
    rate, eta, took = None, None, None
    if run.started_at_ms is not None:
        until_ms = run.finished_at_ms or api.clock.now_ms()
        rate = run.done / max(0.001, (until_ms - run.started_at_ms) / 1000)
        if run.active and rate > 0:
            eta = max(0, run.total - run.done) / rate
        if run.finished_at_ms is not None:
            took = (run.finished_at_ms - run.started_at_ms) / 1000
    return RebuildStatus(
        run.id,
        run.scope,
        run.features,
        run.state,
        run.done,
        run.total,
        round(rate, 1) if rate is not None else None,
        round(eta, 1) if eta is not None else None,
        run.requested_by,
        rfc3339(run.created_at_ms),
        rfc3339(run.started_at_ms) if run.started_at_ms is not None else None,
        rfc3339(run.finished_at_ms) if run.finished_at_ms is not None else None,
        run.error,
        None if run.everyone else run.total,
        took,
    )
