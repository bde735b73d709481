"""The overview: is everything well? States, figures of the last hour, and where to act."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import TypeVar

import msgspec
from litestar import Response, get

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.pages.negotiation import answer
from app.errors import StoreUnavailable
from app.operations.figures import HOUR_MS, SLOT_MS
from app.operations.findings import Finding, waiting_to_be_pruned, wrong_decisions
from app.operations.overview import Overview, Sight, overview
from app.operations.ports import Record
from app.operations.states import looks_of
from app.service import Service
from app.telemetry import logger

T = TypeVar("T")
LOOK_S = 1.5
log = logger("api.overview")
# Where to act on a finding, by its subject.
PLACES: Mapping[str, str] = {
    "dead_letters": "/admin/dead-letters",
    "stale_dropped": "/admin/data-quality",
    "feature_errors": "/admin/features",
    "features": "/admin/features",
    "registry": "/admin/features",
    "rollout": "/admin/rollout",
}
# What stands together on the page.
GROUPS = (
    (
        "Reads",
        ("request_rate", "hit_ratio", "latency_p50_ms", "latency_p99_ms", "failed_requests", "shed", "degraded_reads"),
    ),
    ("Invalidation", ("lag_p50_ms", "lag_p99_ms", "fills_refused", "owed", "consistent")),
    ("Events", ("queue_depth", "outbox", "outbox_age_s", "dead_letters", "unreadable")),
)


@get(
    "/admin",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Is everything well?",
    description="The state of the service and of what it depends on, each with its beginning; figures of the last "
    "minute, of the last hour and of each minute in it, summed over all processes; and what to do where something is "
    "not well. Each process stores a sample every ten seconds; null means that nothing is known. A page for a browser.",
    responses=problems(400, 401, 403, 503),
)
async def get_overview(request: HttpRequest) -> Response[Overview]:
    """Now."""
    service = service_of(request)
    body = await look(service)
    body.findings = [
        msgspec.structs.replace(item, path=service.settings.root_path + PLACES[item.subject])
        if item.subject in PLACES
        else item
        for item in body.findings
    ]
    slot_names = [f"{start[11:16]} UTC" for start in body.slots]
    return await answer(request, body, "overview.html", groups=GROUPS, places=PLACES, slot_names=slot_names)


async def look(service: Service) -> Overview:
    """Everything at a glance, whatever is away."""
    oldest_ms = service.clock.now_ms() - HOUR_MS - SLOT_MS
    sight, record, told = await asyncio.gather(
        _soon("readiness", _sight(service)),
        _soon("samples", service.samples.since(oldest_ms)),
        _soon("findings", _told(service)),
    )
    # An hour of samples takes some milliseconds to add up; reads need not wait for them.
    return await asyncio.to_thread(
        overview, record or Record([], {}), sight, service.process, service.clock.now_ms(), told or ()
    )


async def _soon(what: str, asked: Awaitable[T]) -> T | None:
    """What is asked, if it comes within `LOOK_S`."""
    try:
        async with asyncio.timeout(LOOK_S):
            return await asked
    except (StoreUnavailable, TimeoutError) as error:
        log.warning("overview_incomplete", what=what, error=str(error) or "it took too long")
        return None


async def _sight(service: Service) -> Sight:
    checks, gauges = await asyncio.gather(service.readiness(), service.refresh_gauges())
    return Sight(looks_of(checks), gauges)


async def _told(service: Service) -> list[Finding]:
    alarm, waiting, unknown = await asyncio.gather(
        service.bandit.rollout.alarm(), service.retention.waiting(), service.unknown_decisions()
    )
    found = [] if alarm is None else [Finding("degraded", "rollout", alarm.text, alarm.advice)]
    return found + waiting_to_be_pruned(waiting) + wrong_decisions(unknown)
