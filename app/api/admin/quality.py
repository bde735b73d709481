"""Data quality: how true and how alive what the cache holds is, and whether the values have changed.

JSON is measured on request, unless the caller accepts an older report. Invariant: no figure is older than `max_age_s`
allows. The page shows the newest stored report, with its age.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Response, get, post
from litestar.params import QueryParameter

from app.api.admin.auditing import audited, caller
from app.api.admin.quality_page import cards
from app.api.admin.schemas import QualityRefresh, UserBehind, UsersBehindList
from app.api.auth.forms import is_form
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.openapi.parameters import feature_name
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.errors import Issue, NotFound, Undecodable, UnknownFeature
from app.features.clock import rfc3339
from app.profiles.consistency.inspection import CellFreshness
from app.profiles.quality.drilldown import FoundUsers, Sought
from app.profiles.quality.report import QualityReport
from app.profiles.quality.runs import QualityRun, readable_report
from app.service import Service

SOUGHT: tuple[Sought, ...] = ("fresh", "missing", "stale", "null")
LIMIT, MOST = 50, 500
YEAR_S = 366 * 86_400
RUNS_SHOWN = 5
OLD_MS = 2 * 3_600_000
PATH = "/admin/data-quality"
USERS_PAGE = "data_quality_users.html"
WAITING = {
    None: "A worker measures now; the page shows the new report when it is there.",
    "queue": "Asked for, but the queue does not answer: nothing runs until it is back.",
    "worker": "Asked for, but no worker has shown itself in the last seconds: nothing runs until one is there.",
}


@get(
    "/admin/data-quality",
    opt={"scope": "admin", "schemas": {"max_age_s": {"type": "integer", "minimum": 0, "maximum": YEAR_S}}},
    tags=["Admin"],
    summary="Measure data quality",
    description="Eligible are the users with any event within the longest window of any feature. Of them, 20,000 drawn "
    "at random are measured, or all if there are fewer: per feature, how many values are fresh, missing or stale, with "
    "95 % intervals of the shares, how old they are, how they are distributed, and whether the values have drifted "
    "within 7 days, or why they could not be computed. Measured now, which takes seconds; with `max_age_s` the newest "
    "stored report is answered if it is no older than that.",
    responses=problems(400, 401, 403, 503),
)
async def get_quality(
    request: HttpRequest,
    max_age_s: Annotated[
        int | None, QueryParameter(ge=0, le=YEAR_S, description="How old a stored report may be that is answered.")
    ] = None,
) -> Response[QualityReport]:
    """All features."""
    service = service_of(request)
    if prefers_page(request):
        return await _page(request)
    if max_age_s is not None:
        oldest = rfc3339(service.clock.now_ms() - 1000 * max_age_s)
        run = await service.quality.runs.newest_completed()
        if run is not None:
            stored = readable_report(run)
            if stored is not None and stored.measured_at >= oldest:
                return as_json(stored)
    return as_json(await service.quality.measurement.measure())


async def _page(request: HttpRequest) -> Response[Any]:
    """The newest stored report. If there is none, a measurement is requested, and the page says so."""
    service = service_of(request)
    run, runs = await service.quality.runs.newest_completed(), await service.quality.runs.newest(RUNS_SHOWN)
    report = readable_report(run) if run is not None else None
    begun = report is None and not (runs and runs[0].active)
    if begun:
        runs = [await begin_refresh(request), *runs]
    latest = await refresh_status(service, runs[0])
    return await page(
        request,
        "data_quality.html",
        body=report,
        cards=cards(report.features, service.registry) if report is not None else [],
        latest=latest,
        old=report is not None and report.measured_at < rfc3339(service.clock.now_ms() - OLD_MS),
        begun=begun,
        unreadable=run is not None and report is None,
        window_ms=service.registry.longest_window_ms(),
        most=service.quality.measurement.sample,
        runs=runs,
    )


@post(
    "/admin/data-quality/refresh",
    status_code=202,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Have data quality measured by a worker",
    description="The report is stored. One is measured at a time: while one is under way, that one is answered.",
    responses=problems(400, 401, 403, 503, 507),
)
async def refresh_quality(request: HttpRequest) -> Response[QualityRefresh]:
    """A form is redirected to the page; a program gets the run."""
    status = await refresh_status(service_of(request), await begin_refresh(request))
    if is_form(request):
        return await redirect(request, PATH, WAITING[status.waiting_for])
    return Response(status, status_code=202)


@get(
    "/admin/data-quality/refresh",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Watch the newest measurement by a worker",
    responses=problems(400, 401, 403, 404, 503),
)
async def get_refresh(request: HttpRequest) -> QualityRefresh:
    """404 if none was ever requested."""
    service = service_of(request)
    runs = await service.quality.runs.newest(1)
    if not runs:
        raise NotFound("no report has been requested yet; POST here to have one measured")
    return await refresh_status(service, runs[0])


@get(
    "/admin/data-quality/users",
    opt={
        "scope": "admin",
        "schemas": {"feature": feature_name, "state": {"type": "string", "enum": list(SOUGHT)}},
        "required": ["feature", "state"],
    },
    tags=["Admin"],
    summary="List the users behind a number",
    description="Looked up now among all eligible users, while a report is as of its own time, and may be of a sample. "
    "Each request looks at a bounded number of them; go on with `after`.",
    responses=problems(400, 401, 403, 503),
)
async def get_users_behind(
    request: HttpRequest,
    feature: Annotated[str, QueryParameter(description="The name of a feature.")] = "",
    sought: Annotated[str, QueryParameter(name="state", description="Which users.")] = "",
    after: Annotated[str, QueryParameter(description="Only users with a higher id.")] = "",
    limit: Annotated[int, QueryParameter(ge=1, le=MOST)] = LIMIT,
) -> Response[UsersBehindList]:
    """Those of a state. In a handler, Litestar keeps the name `state` for itself."""
    service = service_of(request)
    if prefers_page(request) and not feature and not sought:
        return await page(request, USERS_PAGE, body=None, names=service.registry.names, states=SOUGHT, limit=limit)
    state = sought_state(feature, sought)
    try:
        service.registry.mask([feature])
    except UnknownFeature as error:
        raise Undecodable(str(error), [Issue("feature", item.detail) for item in error.issues]) from error
    body = listed(feature, state, await service.quality.drilldown.find(feature, state, after, limit))
    return await answer(request, body, USERS_PAGE, names=service.registry.names, states=SOUGHT, limit=limit)


def sought_state(feature: str, state: str) -> Sought:
    """The state that is asked for; raises `Undecodable` (400), naming what is missing or unknown."""
    issues = [] if feature else [Issue("feature", "missing; name a feature")]
    for known in SOUGHT:
        if state == known and not issues:
            return known
    if state not in SOUGHT:
        issues.append(Issue("state", f"must be {', '.join(SOUGHT[:-1])} or {SOUGHT[-1]}"))
    raise Undecodable("the query is not allowed", issues)


async def begin_refresh(request: HttpRequest) -> QualityRun:
    """Ask a worker for a report, on the caller's behalf; the run that is active then."""
    service = service_of(request)
    async with audited(request, "refresh data quality", "everyone") as act:
        run, new = await service.quality.runs.open(caller(request).name, service.clock.now_ms())
        if new:
            await service.quality.start(run.id)
        act.outcome = f"report {run.id}" + ("" if new else ", which was under way already")
    return run


async def refresh_status(service: Service, run: QualityRun) -> QualityRefresh:
    """A run as it is shown."""
    waiting_for = None
    if run.active:
        checks = await service.readiness()
        if not checks["queue"].ok:
            waiting_for = "queue"
        elif not checks["worker"].ok:
            waiting_for = "worker"
    return QualityRefresh(
        run.id,
        run.state,
        run.measured,
        run.requested_by,
        rfc3339(run.requested_at_ms),
        rfc3339(run.started_at_ms) if run.started_at_ms is not None else None,
        rfc3339(run.finished_at_ms) if run.finished_at_ms is not None else None,
        run.error,
        waiting_for,  # type: ignore[arg-type]  # one of those words
    )


def as_json(report: QualityReport) -> Response[QualityReport]:
    """The answer to a program."""
    return Response(report, headers={"Vary": "Accept"})


def listed(feature: str, sought: Sought, found: FoundUsers) -> UsersBehindList:
    """What a look found."""
    users = [_user(look) for look in found.cells] if found.cells is not None else None
    return UsersBehindList(feature, sought, rfc3339(found.at_ms), users, found.scanned, found.next_after)


def _user(look: CellFreshness) -> UserBehind:
    value = look.value
    if value is None:
        return UserBehind(look.user_id, look.state, None, None, None)
    return UserBehind(
        look.user_id,
        look.state,
        msgspec.json.decode(value.json),
        rfc3339(value.computed_at_ms),
        rfc3339(value.expires_at_ms or 0),
    )
