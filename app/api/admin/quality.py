"""Routes of data quality: how fresh cached values are, how they are distributed, and whether they have drifted."""

from typing import Annotated, Any, Literal, get_args

import msgspec
from litestar import Response
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.admin import admin_get, admin_post, audited
from app.api.auth.forms import is_form
from app.api.dependencies import HttpRequest, cancelled_on_disconnect
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.api.schemas import Value
from app.errors import Issue, NotFound, Undecodable, UnknownFeature
from app.features.clock import rfc3339
from app.features.views import view
from app.profiles.consistency.inspection import Inspection, State
from app.profiles.quality.measurement import Sought
from app.profiles.quality.report import QualityReport, QualityRun, RunState, readable_report
from app.service import Service

SOUGHT: tuple[Sought, ...] = get_args(Sought)
RUNS_SHOWN = 5
MAX_AGE_S = 366 * 86_400
OLD_MS, AGAIN_MS = 2 * 3_600_000, 5 * 60_000
PATH = "/admin/data-quality"
REQUESTED = {
    None: "A worker is measuring; this page shows the new report when it is stored.",
    "queue": "The measurement is requested. The queue does not answer, so it is unknown whether a worker is running.",
    "worker": "The measurement is requested. No worker is running: it starts when one is up again.",
}


class QualityRefresh(msgspec.Struct):
    """The progress of a worker's data-quality measurement. `measured` counts users; 0 until `state` is `completed`."""

    id: int
    state: RunState
    measured: int
    requested_by: str
    requested_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    waiting_for: Annotated[Literal["queue", "worker"] | None, Meta(description="What does not answer.")]


class UserBehind(msgspec.Struct):
    """A user and the cached value of the requested feature. `value` and the times are null if no value is cached."""

    user_id: str
    state: State
    value: Value = None
    computed_at: str | None = None
    expires_at: str | None = None


class UsersBehindList(msgspec.Struct):
    """The users whose cached value of `feature` was in the state `state` at the time `at`, in the order of their ids.
    In the state `null`, the cached value is null. A request scans a bounded number of users: continue with
    `after=next_after` until `next_after` is null, even if `users` is empty."""

    feature: str
    state: Sought
    at: str
    users: Annotated[list[UserBehind] | None, Meta(description="Null if the cache does not answer.")]
    scanned: Annotated[int, Meta(description="The number of eligible users that were examined.")]
    next_after: str | None


@admin_get(
    PATH,
    summary="Measure data quality",
    description="Measures 20,000 eligible users drawn at random, or all if there are fewer. A user is eligible with "
    "any event within the longest window of the features. Per feature: how many values are fresh, missing or stale, "
    "with 95 % intervals of the shares, how old they are, how they are distributed, and whether the values have "
    "drifted within 7 days, or why they could not be computed. Measuring takes seconds. With `max_age_s` the newest "
    "stored report is returned instead if it is no older than that.",
)
async def get_quality(
    request: HttpRequest,
    max_age_s: Annotated[
        int | None,
        # Litestar leaves a minimum of zero out.
        QueryParameter(ge=0, le=MAX_AGE_S, description="How old a stored report may be.", schema_extra={"minimum": 0}),
    ] = None,
) -> Response[QualityReport]:
    service = request.service
    if prefers_page(request):
        return await _page(request)
    report = None
    if max_age_s is not None and (run := await service.quality.runs.newest_completed()) is not None:
        report = readable_report(run)
    if report is None or report.measured_at < rfc3339(service.clock.now_ms() - 1000 * (max_age_s or 0)):
        async with cancelled_on_disconnect(request):
            report = await service.quality.measure()
    return await answer(request, report, "data_quality.html")


async def _page(request: HttpRequest) -> Response[Any]:
    """The page with the newest report. If this release can read no report, the page requests a measurement. It requests
    none while a measurement is active, after the newest one failed, or within `AGAIN_MS` after it completed. Otherwise
    an open page, which the browser reloads when a measurement ends, would request one measurement after another."""
    service = request.service
    run, runs = await service.quality.runs.newest_completed(), await service.quality.runs.newest(RUNS_SHOWN)
    report = readable_report(run) if run is not None else None
    now_ms = service.clock.now_ms()
    another = not runs or (runs[0].state == "completed" and now_ms - (runs[0].finished_at_ms or 0) > AGAIN_MS)
    begun = report is None and another
    if begun:
        runs = [await _request_run(request), *runs]
    return await page(
        request,
        "data_quality.html",
        body=report,
        entries={entry.name: entry for entry in service.registry},
        latest=await _refresh_status(service, runs[0]),
        old=report is not None and report.measured_at < rfc3339(now_ms - OLD_MS),
        begun=begun,
        unreadable=run is not None and report is None,
        window_ms=service.registry.longest_window_ms(),
        sample_size=service.quality.sample,
        runs=runs,
    )


@admin_post(
    f"{PATH}/refresh",
    status_code=202,
    summary="Have data quality measured by a worker",
    description="The report is stored. If a measurement is active, no new one starts, and the answer describes it.",
)
async def refresh_quality(request: HttpRequest) -> Response[QualityRefresh]:
    status = await _refresh_status(request.service, await _request_run(request))
    if is_form(request):
        return await redirect(request, PATH, REQUESTED[status.waiting_for])
    return Response(status, status_code=202)


@admin_get(
    f"{PATH}/refresh",
    summary="Watch the newest measurement by a worker",
    description="404 if none was ever requested.",
    problems={404: "No measurement was ever requested."},
)
async def get_refresh(request: HttpRequest) -> QualityRefresh:
    runs = await request.service.quality.runs.newest(1)
    if not runs:
        raise NotFound("no report has been requested yet; POST here to have one measured")
    return await _refresh_status(request.service, runs[0])


@admin_get(
    f"{PATH}/users",
    required=["feature", "state"],
    summary="List the users behind a number",
    description="Searches all eligible users now. A report has its own time and may cover only a sample, so numbers "
    "may differ. Each request scans a bounded number of users; continue with `after`.",
)
async def get_users_behind(
    request: HttpRequest,
    feature: Annotated[str, QueryParameter(description="The name of a feature.")] = "",
    # Not named `state`: Litestar passes its own state to a parameter of that name.
    sought: Annotated[
        str, QueryParameter(name="state", description="The state to look for.", schema_extra={"enum": list(SOUGHT)})
    ] = "",
    after: Annotated[str, QueryParameter(description="Only users with a higher id.")] = "",
    limit: Annotated[int, QueryParameter(ge=1, le=500)] = 50,
) -> Response[UsersBehindList]:
    choices: dict[str, Any] = {"names": request.service.registry.names, "states": SOUGHT, "limit": limit}
    if prefers_page(request) and not feature and not sought:
        return await page(request, "data_quality_users.html", body=None, **choices)
    if sought not in SOUGHT:
        allowed = f"must be {', '.join(SOUGHT[:-1])} or {SOUGHT[-1]}"
        raise Undecodable("the query is not allowed", [Issue("state", allowed)])
    try:
        found = await request.service.quality.find_users(feature, sought, after, limit)
    except UnknownFeature as error:
        raise Undecodable(str(error), [Issue("feature", item.detail) for item in error.issues]) from error
    users = [_user(item) for item in found.users] if found.users is not None else None
    body = view(UsersBehindList, found, feature=feature, state=sought, users=users)
    return await answer(request, body, "data_quality_users.html", **choices)


def _user(item: Inspection) -> UserBehind:
    (cell,) = item.cells
    value = msgspec.json.decode(cell.held.json) if cell.held is not None else None
    return view(UserBehind, cell.held, user_id=item.user_id, state=cell.state, value=value)


async def _request_run(request: HttpRequest) -> QualityRun:
    """Return the active measurement; if there is none, request a new one from a worker."""
    async with audited(request, "refresh data quality", "everyone") as act:
        run, new = await request.service.quality.runs.open(request.user.name, request.service.clock.now_ms())
        act.outcome = f"report {run.id}" + ("" if new else ", which was active already")
    return run


async def _refresh_status(service: Service, run: QualityRun) -> QualityRefresh:
    checks = await service.readiness() if run.active else {}
    waiting_for = next((name for name in ("queue", "worker") if name in checks and not checks[name].ok), None)
    return view(QualityRefresh, run, waiting_for=waiting_for)
