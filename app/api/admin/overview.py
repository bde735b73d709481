"""The route and page of the overview: component states, figures of the last hour, and problems with a remedy."""

import asyncio
from collections.abc import Awaitable, Mapping
from datetime import datetime
from typing import Annotated, TypeVar

from litestar import Response
from litestar.params import QueryParameter

from app.api.admin import admin_get
from app.api.dependencies import HttpRequest
from app.api.pages.negotiation import answer
from app.errors import StoreUnavailable
from app.features.clock import HOUR_MS
from app.operations.component_states import component_views
from app.operations.figures import SLOT_MS, Period, slot_starts
from app.operations.findings import Finding, waiting_to_be_pruned, wrong_decisions
from app.operations.overview import Overview, build_overview
from app.operations.samples import Record, Sample
from app.service import Service
from app.telemetry import logger

T = TypeVar("T")
TIMEOUT_S = 1.5
log = logger("service.overview")
# The page on which to act, by the subject of a finding.
PLACES: Mapping[str, str] = {
    "dead_letters": "/admin/dead-letters",
    "stale_dropped": "/admin/data-quality",
    "feature_errors": "/admin/features",
    "features": "/admin/features",
    "registry": "/admin/features",
    "rollout": "/admin/rollout",
}
SLOT_NAMES: Mapping[Period, str] = {"hour": "%H:%M UTC", "day": "%a %H:%M UTC", "month": "%d %b %H:%M UTC"}


@admin_get(
    "/admin",
    summary="The state of the service",
    description="The state of the service and of each component, and since when; figures of the last minute, of "
    "the last hour and of each minute in it, or of a longer period, summed over all processes; and findings, with what "
    "to do about each. Each process stores a sample every ten seconds; null: not known. A page for a browser.",
)
async def get_overview(
    request: HttpRequest,
    period: Annotated[Period, QueryParameter(description="What `series` shows: the last hour, day or month.")] = "hour",
) -> Response[Overview]:
    service = request.service
    now_ms = service.clock.now_ms()
    # Parts that cannot be read within `TIMEOUT_S` are left out.
    own, record, more, summaries = await asyncio.gather(
        _in_time("readiness", _own_view(service)),
        _in_time("samples", service.samples.since(now_ms - HOUR_MS - SLOT_MS)),
        _in_time("findings", _more_findings(service)),
        _in_time("history", _history(service, slot_starts(now_ms, period)[0], period)),
    )
    # On a thread: adding up an hour of samples takes some milliseconds, and would delay concurrent reads.
    now_ms, history = service.clock.now_ms(), (period, summaries) if summaries is not None else None
    body = await asyncio.to_thread(build_overview, record or Record([], {}), own, now_ms, more or (), history)
    for finding in body.findings:
        if finding.subject in PLACES:
            finding.path = service.settings.root_path + PLACES[finding.subject]
    slot_names = [f"{datetime.fromisoformat(start):{SLOT_NAMES[body.period]}}" for start in body.slots]
    return await answer(request, body, "overview.html", places=PLACES, slot_names=slot_names, periods=SLOT_NAMES)


async def _history(service: Service, since_ms: int, period: Period) -> list[Sample] | None:
    return await service.samples.summaries(since_ms) if period != "hour" else None


async def _in_time(part: str, asked: Awaitable[T]) -> T | None:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asked
    except (StoreUnavailable, TimeoutError) as error:
        log.warning("overview_incomplete", part=part, error=str(error) or "timed out")
        return None


async def _own_view(service: Service) -> Sample:
    checks, gauges = await asyncio.gather(service.readiness(), service.refresh_gauges())
    at_ms, components = service.clock.now_ms(), component_views(checks)
    return Sample(at_ms=at_ms, process=service.process, role="api", seconds=0.0, gauges=gauges, components=components)


async def _more_findings(service: Service) -> list[Finding]:
    waiting, unknown = await asyncio.gather(service.retention.waiting(), service.unknown_decisions())
    alarm = await service.scoring.rollout.alarm() if service.scoring is not None else None
    found = [] if alarm is None else [Finding("degraded", "rollout", *alarm)]
    return found + waiting_to_be_pruned(waiting) + wrong_decisions(unknown)
