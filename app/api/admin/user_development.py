"""The route that shows one user's last 30 days: events by day and by hour, and each feature as of every day."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import Response

from app.api.admin.handlers import admin_get
from app.api.admin.schemas import KINDS, Day, FeaturePoint, Hour, UserDevelopment
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import UserId, problems
from app.api.pages.negotiation import answer, prefers_page, redirect
from app.api.request_parsing import check_ids
from app.events.ports import ActivityCount
from app.features.clock import DAY_MS, rfc3339
from app.features.events import Action
from app.profiles.history.timeline import DAYS, Point, development
from app.profiles.history.validation import Moments
from app.service import Service


@admin_get(
    "/admin/users/{user_id:str}/development",
    summary="Look at a user's last 30 days",
    description="Tips served and reactions by day and by the user's local hour, and each feature as of every day. Days "
    "are 24 hours that end now, so their sum is what a feature over 30 days counts. A browser is redirected to the "
    "page of the user.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_development(request: HttpRequest, user_id: UserId) -> Response[UserDevelopment]:
    check_ids([user_id], "user_id")
    if prefers_page(request):
        return await redirect(request, f"/admin/users/{quote(user_id, safe='')}#activity")
    return await answer(request, await user_development(service_of(request), user_id), "user.html")


async def user_development(service: Service, user_id: str) -> UserDevelopment:
    """A user's last 30 days before now: counts of events, and features as of each day."""
    now_ms = service.clock.now_ms()
    moments = Moments(service.registry, service.settings.retention_days, service.clock)
    counts, points = await asyncio.gather(
        service.user_events.activity(user_id, now_ms, DAYS),
        development(service.reader.read_as_of, moments, user_id, now_ms),
    )
    return UserDevelopment(
        user_id,
        rfc3339(now_ms),
        days(counts, now_ms),
        hours(counts),
        {name: _course(index, points) for index, name in enumerate(service.registry.names)},
    )


def days(counts: Sequence[ActivityCount], now_ms: int) -> list[Day]:
    """A user's events counted by day and kind, oldest day first. Days are 24 hours that end at `now_ms`."""
    found = [Day(start=rfc3339(now_ms - (ago + 1) * DAY_MS), end=rfc3339(now_ms - ago * DAY_MS)) for ago in range(DAYS)]
    for item in counts:
        _add(found[item.days_ago], item)
    return found[::-1]


def hours(counts: Sequence[ActivityCount]) -> list[Hour]:
    """A user's events counted by local hour, 0 to 23, and kind."""
    found = [Hour(hour=hour) for hour in range(24)]
    for item in counts:
        _add(found[item.local_hour], item)
    return found


def _add(counts: Day | Hour, item: ActivityCount) -> None:
    if item.kind in KINDS:  # a newer release that was rolled back may have stored another kind
        setattr(counts, item.kind, getattr(counts, item.kind) + item.events)


def _course(index: int, points: Sequence[Point]) -> list[FeaturePoint]:
    return [
        FeaturePoint(
            rfc3339(point.at_ms),
            msgspec.json.decode(point.profile[index].json) if index in point.profile else None,
            index in point.profile,
        )
        for point in points
    ]


def chart_context(body: UserDevelopment) -> dict[str, Any]:
    """The template variables for the charts of a user's page."""
    return {
        "kinds": KINDS,
        "hour_names": [f"{hour.hour:02d}" for hour in body.hours],
        "day_reactions": _reactions(body.days),
        "hour_reactions": _reactions(body.hours),
    }


def _reactions(counts: Sequence[Day | Hour]) -> dict[str, list[int]]:
    return {action.value: [getattr(count, action) for count in counts] for action in Action}
