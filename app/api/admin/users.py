"""Admins' route that looks at one user.

Invariant: what is told of the cache is what it held before the look. The JSON answer also reads the profile, after
looking, as a recommender would; that fills the cache, as every read does. The page fills nothing, so that loading it
again shows what was there and not what the page did.
"""

from __future__ import annotations

import asyncio

import msgspec
from litestar import Response, get

from app.api.admin.user_development import figures, user_development
from app.api.admin.user_schemas import CellState, HeldValue, StoredEvent, UserView
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import UserId, problems
from app.api.pages.negotiation import answer, prefers_page
from app.api.request_parsing import check_ids
from app.events.ports import TracedEvent
from app.features.clock import rfc3339, to_ms
from app.features.events import subject_of
from app.features.registry import Registry
from app.profiles.consistency.inspection import InspectedCell, Inspection
from app.profiles.online.cache_protocol import FeatureValue, Profile
from app.service import Service

NEWEST_EVENTS = 50


@get(
    "/admin/users/{user_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Look at a user",
    description="Each feature with its freshness and what a computation gives now, and the user's newest events. "
    "A page for a browser.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_user(request: HttpRequest, user_id: UserId) -> Response[UserView]:
    """One user."""
    service = service_of(request)
    check_ids([user_id], "user_id")
    if prefers_page(request):
        return await _page(request, service, user_id)
    (inspection,) = await service.inspector.inspect([user_id])
    view = await _view(service, user_id, inspection, await _read(service, user_id, inspection))
    return await answer(request, view, "user.html")


async def _page(request: HttpRequest, service: Service, user_id: str) -> Response[UserView]:
    (inspection,), holdings, development = await asyncio.gather(
        service.inspector.inspect([user_id]), service.users.holdings(user_id), user_development(service, user_id)
    )
    profile = {index: inspection.reading(index) for index in range(len(service.registry))}
    return await answer(
        request,
        await _view(service, user_id, inspection, profile),
        "user.html",
        cache=inspection.cache,
        holdings=holdings,
        retention_days=service.settings.retention_days,
        development=development,
        **figures(development),
    )


async def _read(service: Service, user_id: str, inspection: Inspection) -> Profile:
    """Read the profile, unless the look has just computed what that would compute again."""
    if inspection.cache == "trusted":
        return (await service.reader.read({user_id: service.registry.full_mask}, patient=True))[user_id]
    return {index: inspection.reading(index) for index in range(len(service.registry))}


async def _view(service: Service, user_id: str, inspection: Inspection, profile: Profile) -> UserView:
    events = await service.user_events.newest_events(user_id, NEWEST_EVENTS)
    return UserView(
        user_id,
        {cell.entry.name: cell_state(cell, profile[index], inspection) for index, cell in enumerate(inspection.cells)},
        [stored(item, service.registry) for item in events],
    )


def cell_state(cell: InspectedCell, reading: FeatureValue, inspection: Inspection) -> CellState:
    """A cell as admins see it. `reading`: what a read gives."""
    entry, held = cell.entry, cell.held
    return CellState(
        msgspec.json.decode(reading.json),
        entry.dtype,
        rfc3339(reading.computed_at_ms),
        rfc3339(reading.expires_at_ms) if reading.expires_at_ms is not None else None,
        "cache" if reading.cached else "computed",
        cell.state,
        list(entry.invalidated_by),
        entry.description,
        cell.state if inspection.cache == "trusted" and cell.state is not None else "degraded",
        entry.ttl_ms / 1000,
        cell.holds,
        HeldValue(
            msgspec.json.decode(held.json),
            rfc3339(held.computed_at_ms),
            rfc3339(held.expires_at_ms or 0),
            max(0, (held.expires_at_ms or 0) - inspection.at_ms) / 1000,
            held.seq,
        )
        if held is not None
        else None,
        msgspec.json.decode(cell.outcome.json),
        cell.outcome.error,
        cell.difference,
        cell.disabled and cell.outcome.error is not None,
    )


def stored(item: TracedEvent, registry: Registry) -> StoredEvent:
    """An event as admins see it."""
    event, received_at_ms = item.logged.event, item.logged.received_at_ms
    return StoredEvent(
        item.logged.seq,
        rfc3339(received_at_ms),
        msgspec.to_builtins(event),
        rfc3339(item.counted_at_ms),
        item.claimed_at_ms is not None,
        received_at_ms - to_ms(event.occurred_at),
        [name for name in registry.names if name in registry.invalidated_by(subject_of(event))],
        "dead letter" if item.letter_id is not None else "consumed" if item.consumed_at_ms is not None else "waiting",
        rfc3339(item.consumed_at_ms) if item.consumed_at_ms is not None else None,
        item.logged.attempts,
        item.letter_id,
    )
