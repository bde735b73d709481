"""Routes to start, list, watch and cancel rebuilds of many users."""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from litestar import Response
from litestar.params import FromPath
from msgspec import Meta

from app.api.admin import admin_delete, admin_get, admin_post, audited, form_post
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.api.request_parsing import body_as, check_ids
from app.api.schemas import MAX_USERS, FeatureNames
from app.errors import Conflict, InvalidInput, Issue, NotFound, UnknownFeature
from app.features.ids import Id, id_problem
from app.features.registry import indices
from app.features.views import view
from app.profiles.ports import COUNTED
from app.profiles.rebuild import RebuildRun, State, scope_of
from app.service import Service

HOME = "/admin/rebuilds"
SHOWN = 100


class RebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    scope: str | None = None
    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)] | None = None
    features: FeatureNames | None = None


# The two forms of a `RebuildRequest`, for the OpenAPI document.
class RebuildOfAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rebuild features of all eligible users: those with an event in the longest feature window."""

    scope: Literal["all"]
    user_ids: None = None
    features: FeatureNames | None = None


class RebuildOfUsers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rebuild features of a list of users."""

    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)]
    scope: None = None
    features: FeatureNames | None = None


class RebuildStatus(msgspec.Struct):
    """A rebuild and its progress: `done` of `total` users. At most 100,000 eligible users are counted in advance. If
    there are more, `total` is 100,000 or `done`, whichever is greater, and `eta_s` is null."""

    id: str
    scope: Annotated[str, Meta(description="`all`, or `users:` and a hash of the list.")]
    features: list[str]
    state: State
    done: int
    total: int
    rate_per_s: float | None
    eta_s: float | None
    requested_by: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    user_count: Annotated[int | None, Meta(description="Length of the list; null for every eligible user.")]
    took_s: Annotated[float | None, Meta(description="From start to end; null before the end.")]


class RebuildList(msgspec.Struct):
    """The newest rebuilds, newest first."""

    rebuilds: list[RebuildStatus]


class AlreadyActive(Conflict):
    """An active `run` of the same scope prevents the start of another one."""

    def __init__(self, run: RebuildRun) -> None:
        super().__init__(f"rebuild {run.id} of the same scope is {run.state}, at {run.done} of {run.total}")
        self.run = run


@admin_post(
    HOME,
    status_code=202,
    body=[RebuildOfAll, RebuildOfUsers],
    summary="Start a rebuild",
    description="Rebuilds every eligible user (`scope: all`), or up to 1,000 users. Workers carry it out; reads "
    "return the cached values meanwhile. 409 if a rebuild of the same scope is active.",
    problems={409: "A rebuild of the same scope is active."},
)
async def start_rebuild(request: HttpRequest) -> Response[RebuildStatus]:
    if is_form(request):
        return await _start_from_form(request)
    wanted = await body_as(request, RebuildRequest)
    if wanted.scope not in (None, "all"):
        raise InvalidInput("the scope is unknown", [Issue("scope", 'must be "all"; name single users in user_ids')])
    if (wanted.scope is None) == (wanted.user_ids is None):
        raise InvalidInput("the scope is unclear", [Issue("$", 'give either {"scope": "all"} or {"user_ids": […]}')])
    check_ids(wanted.user_ids or [], "user_ids[{}]")
    run = await _start(request, wanted.user_ids, wanted.features)
    return Response(_status(request.service, run), status_code=202)


@admin_get(HOME, summary="List rebuilds", description=f"The newest {SHOWN}, newest first. A page for a browser.")
async def get_rebuilds(request: HttpRequest) -> Response[RebuildList]:
    if prefers_page(request):
        return await _rebuilds_page(request)
    return await answer(request, await _newest(request.service), "rebuilds.html")


@admin_get(f"{HOME}/{{run_id:str}}", summary="Watch a rebuild", description="A page for a browser.")
async def get_rebuild(request: HttpRequest, run_id: FromPath[str]) -> Response[RebuildStatus]:
    service = request.service
    run = await _run(service, run_id)
    checks = await service.readiness() if run.active and prefers_page(request) else None
    return await answer(request, _status(service, run), "rebuild.html", checks=checks)


@admin_delete(
    f"{HOME}/{{run_id:str}}",
    status_code=200,
    summary="Cancel a rebuild",
    description="It stops after the current chunk of users. 409 if it has ended.",
    problems={409: "The rebuild has ended."},
)
async def cancel_rebuild(request: HttpRequest, run_id: FromPath[str]) -> RebuildStatus:
    return _status(request.service, await _cancel(request, run_id))


@form_post(f"{HOME}/{{run_id:str}}/cancel")
async def cancel_from_page(request: HttpRequest, run_id: FromPath[str]) -> Response[Any]:
    await read_form(request)
    try:
        run = await _cancel(request, run_id)
        message = f"The rebuild was cancelled at {run.done} of {run.total} users."
    except Conflict as error:
        message = f"Nothing was cancelled: {error}."
    return await redirect(request, f"{HOME}/{quote(run_id, safe='')}", message)


async def _start(request: HttpRequest, user_ids: Sequence[str] | None, features: Sequence[str] | None) -> RebuildRun:
    """Start a rebuild of `user_ids`, or of every eligible user if None. Raises `UnknownFeature` and `AlreadyActive`."""
    service = request.service
    mask = service.registry.mask(features)
    users = list(dict.fromkeys(user_ids)) if user_ids is not None else None
    now_ms = service.clock.now_ms()
    run = RebuildRun(
        id=secrets.token_hex(8),
        scope=scope_of(users),
        user_ids=users,
        features=[service.registry.names[index] for index in indices(mask)],
        total=await service.rebuild_runner.total(users, mask),
        requested_by=request.user.name,
        created_at_ms=now_ms,
        touched_at_ms=now_ms,
    )
    async with audited(request, "start rebuild", run.scope) as act:
        if (active := await service.rebuild_runs.open(run)) is not None:
            raise AlreadyActive(active)
        act.outcome = run.id
    return run


async def _start_from_form(request: HttpRequest) -> Response[Any]:
    form = await read_form(request)
    scope, text, features = form.get("scope"), form.get("user_ids", ""), form.getall("features", [])
    draft = {"scope": scope, "user_ids": text, "features": features}
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    users = list(dict.fromkeys(line for _, line in lines))
    issues = [] if features else [Issue("features", "choose at least one")]
    if scope not in ("all", "users"):
        issues = [Issue("scope", "choose every eligible user, or a list of users")]
    elif scope == "users" and len(users) > MAX_USERS:
        issues = [Issue("user_ids", f"at most {MAX_USERS:,} users at once, not {len(users):,}")]
    elif scope == "users":
        issues += [Issue(f"line {number}", problem) for number, line in lines if (problem := id_problem(line))]
        issues += [] if users else [Issue("user_ids", "write one id on each line")]
    if issues:
        return await _rebuilds_page(request, 422, **draft, issues=issues)
    try:
        run = await _start(request, users if scope == "users" else None, features)
    except UnknownFeature as error:
        return await _rebuilds_page(request, 422, **draft, issues=error.issues)
    except AlreadyActive as error:
        return await _rebuilds_page(request, 409, **draft, active=error.run)
    return await redirect(request, f"{HOME}/{run.id}", "The rebuild is queued.")


async def _cancel(request: HttpRequest, run_id: str) -> RebuildRun:
    """Cancel a run and return its new state. Raises `NotFound`, or `Conflict` if the run has ended."""
    service = request.service
    run = await _run(service, run_id)
    async with audited(request, "cancel rebuild", run.scope) as act:
        if not await service.rebuild_runs.finish(run.id, "cancelled", service.clock.now_ms(), None):
            raise Conflict(f"rebuild {run.id} has ended: it is {(await _run(service, run_id)).state}")
        act.outcome = run.id
    return await _run(service, run_id)


async def _run(service: Service, run_id: str) -> RebuildRun:
    run = await service.rebuild_runs.get(run_id)
    if run is None:
        raise NotFound(f"there is no rebuild {run_id}")
    return run


async def _newest(service: Service) -> RebuildList:
    return RebuildList([_status(service, run) for run in await service.rebuild_runs.newest(SHOWN)])


def _status(service: Service, run: RebuildRun) -> RebuildStatus:
    span_s = None
    if run.started_at_ms is not None:
        # Negative if the clock of the worker that began it was ahead of the other clock.
        span_s = max(0, (run.finished_at_ms or service.clock.now_ms()) - run.started_at_ms) / 1000
    rate = run.done / span_s if span_s else None
    left = max(0, run.total - run.done) if run.active and run.total < COUNTED else None
    return view(
        RebuildStatus,
        run,
        total=max(run.total, run.done),
        rate_per_s=round(rate, 1) if rate is not None else None,
        eta_s=round(left / rate, 1) if rate and left is not None else None,
        user_count=None if run.everyone else run.total,
        took_s=span_s if run.finished_at_ms is not None else None,
    )


async def _rebuilds_page(request: HttpRequest, status_code: int = 200, **draft: Any) -> Response[Any]:
    """The page of rebuilds. `draft` has the contents of its form, the `issues` found in them, and the `active` rebuild
    that prevented the start of the requested one."""
    service = request.service
    new = {"scope": "all", "user_ids": "", "features": service.registry.names, "issues": (), "active": None}
    return await page(
        request,
        "rebuilds.html",
        status_code=status_code,
        body=await _newest(service),
        draft=new | draft,
        features=list(service.registry),
        checks=await service.readiness(),
        max_users=MAX_USERS,
        shown_at_most=SHOWN,
        window_ms=service.registry.longest_window_ms(),
    )
