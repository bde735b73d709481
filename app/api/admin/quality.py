"""Routes of data quality: how fresh cached values are, how they are distributed, and whether they have drifted.

A JSON request measures now, unless its `max_age_s` allows a stored report. The page shows the newest stored report
with its age, however old it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import msgspec
from litestar import Response
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.admin import admin_get, admin_post
from app.api.admin.auditing import audited, caller
from app.api.auth.forms import is_form
from app.api.dependencies import HttpRequest, cancelled_on_disconnect, service_of
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.api.schemas import Value
from app.errors import Issue, NotFound, Undecodable, UnknownFeature
from app.features.clock import rfc3339
from app.features.views import view
from app.profiles.consistency.inspection import Inspection
from app.profiles.quality.measurement import Sought
from app.profiles.quality.report import QualityReport, QualityRun, readable_report
from app.service import Service

SOUGHT: tuple[Sought, ...] = ("fresh", "missing", "stale", "null")
LIMIT, MAX_LIMIT = 50, 500
YEAR_S = 366 * 86_400
RUNS_SHOWN = 5
OLD_MS = 2 * 3_600_000
AGAIN_MS = 5 * 60_000
PATH = "/admin/data-quality"
USERS_PAGE = "data_quality_users.html"
REQUESTED = {
    None: "A worker is measuring; this page shows the new report when it is stored.",
    "queue": "The measurement is requested. The queue does not answer: it starts when the queue is up again.",
    "worker": "The measurement is requested. No worker is running: it starts when one is up again.",
}


class QualityRefresh(msgspec.Struct):
    """The progress of a data-quality measurement by a worker. `measured`: the number of users, once completed."""

    id: int
    state: Literal["queued", "running", "completed", "failed"]
    measured: int
    requested_by: str
    requested_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    waiting_for: Annotated[
        Literal["queue", "worker"] | None,
        Meta(description="What prevents progress: the queue does not answer, or no worker is running."),
    ]


class UserBehind(msgspec.Struct):
    """A user and the cached value of the requested feature. `value` and the times are null if no value is cached."""

    user_id: str
    state: Literal["fresh", "missing", "stale"]
    value: Value
    computed_at: str | None
    expires_at: str | None


class UsersBehindList(msgspec.Struct):
    """The users whose cached value of `feature` was in the state `state` at the time `at`, in the order of their ids.
    `null` means that a null is cached. A request scans a bounded number of users: continue with `after=next_after`
    until it is null, even if `users` is empty."""

    feature: str
    state: Literal["fresh", "missing", "stale", "null"]
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
        QueryParameter(
            ge=0,
            le=YEAR_S,
            description="The largest age of a stored report to answer with.",
            schema_extra={"minimum": 0},  # Litestar leaves a zero out
        ),
    ] = None,
) -> Response[QualityReport]:
    service = service_of(request)
    if prefers_page(request):
        return await _page(request)
    if max_age_s is not None:
        oldest = rfc3339(service.clock.now_ms() - 1000 * max_age_s)
        run = await service.quality.runs.newest_completed()
        stored = readable_report(run) if run is not None else None
        if stored is not None and stored.measured_at >= oldest:
            return await answer(request, stored, "data_quality.html")
    async with cancelled_on_disconnect(request):
        report = await service.quality.measure()
    return await answer(request, report, "data_quality.html")


async def _page(request: HttpRequest) -> Response[Any]:
    """The page with the newest stored report.

    If there is none that this release can read, a measurement is requested, unless the newest one is active, has
    failed, or was completed a moment ago. An open page is loaded again when a measurement ends, so it would otherwise
    request one after the other.
    """
    service = service_of(request)
    run, runs = await service.quality.runs.newest_completed(), await service.quality.runs.newest(RUNS_SHOWN)
    report = readable_report(run) if run is not None else None
    now_ms = service.clock.now_ms()
    another = not runs or (runs[0].state == "completed" and now_ms - (runs[0].finished_at_ms or 0) > AGAIN_MS)
    begun = report is None and another
    if begun:
        runs = [await _request_run(request), *runs]
    latest = await _refresh_status(service, runs[0])
    return await page(
        request,
        "data_quality.html",
        body=report,
        entries={entry.name: entry for entry in service.registry},
        latest=latest,
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
    status = await _refresh_status(service_of(request), await _request_run(request))
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
    service = service_of(request)
    runs = await service.quality.runs.newest(1)
    if not runs:
        raise NotFound("no report has been requested yet; POST here to have one measured")
    return await _refresh_status(service, runs[0])


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
        str,
        QueryParameter(
            name="state", description="The state of the users to list.", schema_extra={"enum": list(SOUGHT)}
        ),
    ] = "",
    after: Annotated[str, QueryParameter(description="Only users with a higher id.")] = "",
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_LIMIT)] = LIMIT,
) -> Response[UsersBehindList]:
    service = service_of(request)
    choices: dict[str, Any] = {"names": service.registry.names, "states": SOUGHT, "limit": limit}
    if prefers_page(request) and not feature and not sought:
        return await page(request, USERS_PAGE, body=None, **choices)
    issues = [] if feature else [Issue("feature", "missing; name a feature")]
    if sought not in SOUGHT:
        issues.append(Issue("state", f"must be {', '.join(SOUGHT[:-1])} or {SOUGHT[-1]}"))
    if issues:
        raise Undecodable("the query is not allowed", issues)
    state = cast(Sought, sought)
    try:
        service.registry.mask([feature])
    except UnknownFeature as error:
        raise Undecodable(str(error), [Issue("feature", item.detail) for item in error.issues]) from error
    found = await service.quality.find_users(feature, state, after, limit)
    users = [_user(item) for item in found.users] if found.users is not None else None
    body = UsersBehindList(feature, state, rfc3339(found.at_ms), users, found.scanned, found.next_after)
    return await answer(request, body, USERS_PAGE, **choices)


def _user(item: Inspection) -> UserBehind:
    (cell,) = item.cells
    if cell.held is None:
        return view(UserBehind, cell, user_id=item.user_id, value=None, computed_at=None, expires_at=None)
    value = msgspec.json.decode(cell.held.json)
    return view(UserBehind, cell.held, user_id=item.user_id, state=cell.state, value=value)


async def _request_run(request: HttpRequest) -> QualityRun:
    """Return the active measurement; if there is none, request a new one from a worker."""
    service = service_of(request)
    async with audited(request, "refresh data quality", "everyone") as act:
        run, new = await service.quality.runs.open(caller(request).name, service.clock.now_ms())
        if new:
            await service.quality.start(run.id)
        act.outcome = f"report {run.id}" + ("" if new else ", which was active already")
    return run


async def _refresh_status(service: Service, run: QualityRun) -> QualityRefresh:
    waiting_for: Literal["queue", "worker"] | None = None
    if run.active:
        checks = await service.readiness()
        if not checks["queue"].ok:
            waiting_for = "queue"
        elif not checks["worker"].ok:
            waiting_for = "worker"
    return view(QualityRefresh, run, waiting_for=waiting_for)
