"""Routes that show one user, and what the cache held before the request. The JSON answer also has the result of an
ordinary read, which fills the cache. The page does not fill the cache, so that a reload shows the same state."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from litestar import Response
from msgspec import Meta

from app.api.admin import admin_get
from app.api.dependencies import HttpRequest
from app.api.openapi import UserId
from app.api.pages.negotiation import answer, prefers_page, redirect
from app.api.schemas import Value
from app.events.ports import TracedEvent
from app.features.clock import DAY_MS, rfc3339, to_ms
from app.features.events import Action, subject_of
from app.features.registry import Registry
from app.features.views import view
from app.profiles.consistency.inspection import Difference, Holds, InspectedCell, Inspection, State
from app.profiles.history import DAYS
from app.profiles.online.cache_protocol import FeatureValue, Profile
from app.service import Service

HOME = "/admin/users"
NEWEST_EVENTS, NEWEST_DECISIONS = 50, 3


class StoredEvent(msgspec.Struct):
    """A stored event, and whether a worker has consumed it."""

    seq: int
    received_at: str
    event: dict[str, Any]
    counted_at: Annotated[str, Meta(description="The event time that features use.")]
    time_corrected: Annotated[bool, Meta(description="Its time was ahead of the clock; that of the arrival is used.")]
    arrival_lag_ms: Annotated[int, Meta(description="From the producer's `occurred_at` to the arrival.")]
    invalidates: Annotated[list[str], Meta(description="The features that the event invalidated.")]
    state: Annotated[
        Literal["waiting", "consumed", "dead letter"],
        Meta(description="`waiting` since `received_at`: no worker has consumed it. Features count it in any state."),
    ]
    attempts: Annotated[int, Meta(description="How often consuming it has failed.")]
    dead_letter: Annotated[int | None, Meta(description="The id of its dead letter.")]


class CachedValueView(msgspec.Struct):
    """A value in the cache that has not expired."""

    value: Value
    computed_at: str
    expires_at: str
    ttl_left_s: float
    seq: Annotated[int, Meta(description="The user's newest event that its computation saw.")]


class FeatureStateView(msgspec.Struct):
    """A feature of a user: its value as read, as cached before (`held`), and as computed now (`recomputed`)."""

    value: Value
    dtype: Literal["float", "int", "str"]
    computed_at: str
    expires_at: str | None
    origin: Literal["cache", "computed"]
    freshness: Annotated[State | None, Meta(description="Of the value cached before; null if no cache answers.")]
    invalidated_by: list[str]
    description: str
    state: Annotated[
        Literal[State, "degraded"],
        Meta(description="As `freshness`; `degraded` if reads compute because the cache is down or not trusted."),
    ]
    ttl_s: float
    holds: Annotated[Holds | None, Meta(description="Content of the key; `lease` while a reader computes the value.")]
    held: Annotated[CachedValueView | None, Meta(description="The value that the cache held before this request.")]
    recomputed: Annotated[Value, Meta(description="The result of a computation now.")]
    error: Annotated[str | None, Meta(description="Why it could not be computed, or who disabled it.")]
    difference: Annotated[
        Difference | None,
        Meta(
            description="Between `held` and `recomputed`. `stale`: an event arrived and the value was not deleted. "
            "`unexplained`: no event explains it; a rebuild corrects it."
        ),
    ]
    disabled: Annotated[bool, Meta(description="An admin has disabled the feature: it is served as null.")]


class UserView(msgspec.Struct):
    """A user: every feature, and the newest events."""

    user_id: str
    features: dict[str, FeatureStateView]
    events: list[StoredEvent]


KINDS = ("served", *(action.value for action in Action))
if TYPE_CHECKING:
    KindCounts = msgspec.Struct
else:  # the number of tips served, and of each kind of reaction
    KindCounts = msgspec.defstruct("KindCounts", [(kind, int, 0) for kind in KINDS])


class DailyTips(KindCounts, kw_only=True):
    """A user's events in 24 hours, after `start` and up to `end`, counted by kind."""

    start: str
    end: str


class HourlyTips(KindCounts, kw_only=True):
    """A user's events of the last 30 days in one hour of the day, 0 to 23 in the user's time zone, counted by kind."""

    hour: int


class FeaturePoint(msgspec.Struct):
    """The value that a feature had at the time `at`."""

    at: str
    value: Value
    known: Annotated[bool, Meta(description="False if the window begins before the oldest kept event.")]


class UserDevelopment(msgspec.Struct):
    """A user's events and feature values of the last 30 days. Each of the `days` is a period of 24 hours; the last one
    ends now. `hours` counts the events by hour of the day in the user's time zone."""

    user_id: str
    at: str
    days: list[DailyTips]
    hours: list[HourlyTips]
    features: dict[str, list[FeaturePoint]]


@admin_get(
    f"{HOME}/{{user_id:str}}",
    summary="Look at a user",
    description="Each feature with its freshness and the result of a computation now, and the user's newest events. "
    "A page for a browser.",
)
async def get_user(request: HttpRequest, user_id: UserId) -> Response[UserView]:
    service = request.service
    if prefers_page(request):
        return await _user_page(request, user_id)
    (inspection,) = await service.inspector.inspect([user_id])
    profile = None
    if inspection.cache == "trusted":  # otherwise a read would only repeat the computation of the inspection
        profile = (await service.reader.read({user_id: service.registry.full_mask}, patient=True))[user_id]
    return await answer(request, await _user_view(service, inspection, profile), "user.html")


async def _user_page(request: HttpRequest, user_id: str) -> Response[UserView]:
    service = request.service
    (inspection,), holdings, development = await asyncio.gather(
        service.inspector.inspect([user_id]), service.users.holdings(user_id), user_development(service, user_id)
    )
    decisions = None  # scoring is off
    if service.scoring is not None:
        decisions, _ = await service.scoring.decisions.newest(NEWEST_DECISIONS, user_id=user_id)
    return await answer(
        request,
        await _user_view(service, inspection),
        "user.html",
        cache=inspection.cache,
        holdings=holdings,
        retention_days=service.settings.retention_days,
        development=development,
        decisions=decisions,
        kinds=KINDS,
        hour_names=[f"{hour:02d}" for hour in range(24)],
        day_reactions=_reactions(development.days),
        hour_reactions=_reactions(development.hours),
    )


async def _user_view(service: Service, inspection: Inspection, profile: Profile | None = None) -> UserView:
    """The view of an inspected user. Its values are from `profile` or, if that is None, from the inspection."""
    events = await service.users.newest_events(inspection.user_id, NEWEST_EVENTS)
    features = {
        cell.entry.name: _cell_state(cell, profile[index] if profile else inspection.reading(index), inspection)
        for index, cell in enumerate(inspection.cells)
    }
    return UserView(inspection.user_id, features, [_stored_event(item, service.registry) for item in events])


def _cell_state(cell: InspectedCell, reading: FeatureValue, inspection: Inspection) -> FeatureStateView:
    held = None
    if (cached := cell.held) is not None:
        left_s = max(0, (cached.expires_at_ms or 0) - inspection.at_ms) / 1000
        value = msgspec.json.decode(cached.json)
        held = view(CachedValueView, cached, value=value, ttl_left_s=left_s, seq=cached.version)
    return view(
        FeatureStateView,
        reading,
        cell,
        cell.entry,
        value=msgspec.json.decode(reading.json),
        origin="cache" if reading.cached else "computed",
        freshness=cell.state,
        state=cell.state if inspection.cache == "trusted" and cell.state is not None else "degraded",
        ttl_s=cell.entry.ttl_ms / 1000,
        held=held,
        recomputed=msgspec.json.decode(cell.outcome.json),
        error=cell.outcome.error,
        disabled=cell.disabled and cell.outcome.error is not None,
    )


def _stored_event(item: TracedEvent, registry: Registry) -> StoredEvent:
    event, logged = item.logged.event, item.logged
    return view(
        StoredEvent,
        item,
        logged,
        event=msgspec.to_builtins(event),
        time_corrected=item.claimed_at_ms is not None,
        arrival_lag_ms=logged.received_at_ms - to_ms(event.occurred_at),
        invalidates=[name for name in registry.names if name in registry.invalidated_by(subject_of(event))],
        state="dead letter" if item.letter_id is not None else "consumed" if item.consumed else "waiting",
        dead_letter=item.letter_id,
    )


@admin_get(
    f"{HOME}/{{user_id:str}}/development",
    summary="Look at a user's last 30 days",
    description="Tips served and reactions by day and by the user's local hour, and each feature as of every day. Days "
    "are 24 hours that end now, so their sum is what a feature over 30 days counts. A browser is redirected to the "
    "page of the user.",
)
async def get_development(request: HttpRequest, user_id: UserId) -> Response[UserDevelopment]:
    if prefers_page(request):
        return await redirect(request, f"/admin/users/{quote(user_id, safe='')}#activity")
    return await answer(request, await user_development(request.service, user_id), "user.html")


async def user_development(service: Service, user_id: str) -> UserDevelopment:
    now_ms = service.clock.now_ms()
    asked = (await service.moments()).timeline(user_id, now_ms)
    counts, profiles = await asyncio.gather(
        service.users.activity(user_id, now_ms, DAYS), service.reader.read_as_of(asked)
    )
    ends = [row.now_ms or 0 for row in asked]
    by_day: defaultdict[int, Counter[str]] = defaultdict(Counter)
    by_hour: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for item in counts:
        if item.kind in KINDS:  # a newer release that was rolled back may have stored another kind
            by_day[item.days_ago][item.kind] += item.events
            by_hour[item.local_hour][item.kind] += item.events
    return UserDevelopment(
        user_id,
        rfc3339(now_ms),
        [DailyTips(start=rfc3339(end - DAY_MS), end=rfc3339(end), **by_day[(now_ms - end) // DAY_MS]) for end in ends],
        [HourlyTips(hour=hour, **by_hour[hour]) for hour in range(24)],
        {name: _course(index, zip(ends, profiles, strict=True)) for index, name in enumerate(service.registry.names)},
    )


def _course(index: int, points: Iterable[tuple[int, Profile]]) -> list[FeaturePoint]:
    return [
        FeaturePoint(rfc3339(at_ms), msgspec.json.decode(profile[index].json), known=True)
        if index in profile
        else FeaturePoint(rfc3339(at_ms), None, known=False)
        for at_ms, profile in points
    ]


def _reactions(counts: Sequence[DailyTips | HourlyTips]) -> dict[str, list[int]]:
    return {kind: [getattr(count, kind) for count in counts] for kind in KINDS if kind != "served"}
