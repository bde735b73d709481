"""Routes to find, inspect, rebuild and erase users.

The view of a user shows what the cache held before the request. The JSON answer also contains the result of an ordinary
read, which fills the cache. The page does not fill the cache, so that a reload shows the same state. Before the page
erases a user, it shows what would be deleted and asks for the user's id.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from litestar import MediaType, Response
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from app.api.admin.auditing import audited
from app.api.admin.handlers import ADMIN, admin_delete, admin_get, admin_post, form_post
from app.api.admin.schemas import (
    CellState,
    HeldValue,
    StoredEvent,
    UserHoldings,
    UserRebuildRequest,
    UsersFound,
    UserView,
)
from app.api.admin.user_development import chart_context, user_development
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest, renderer_of, selected, service_of
from app.api.openapi.document import UserId, problems
from app.api.openapi.parameters import ID_PREFIX
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.api.request_parsing import body_as, check_ids, prefix_of
from app.api.schemas import ProfileAnswer
from app.events.ports import Holdings, TracedEvent
from app.features.clock import rfc3339, to_ms
from app.features.events import subject_of
from app.features.ids import id_problem, user_hash, visible
from app.features.registry import Registry, indices
from app.profiles.consistency.inspection import InspectedCell, Inspection
from app.profiles.online.cache_protocol import FeatureValue, Profile
from app.service import Service

HOME = "/admin/users"
FOUND_BY_DEFAULT, FOUND_MOST = 20, 100
NEWEST_EVENTS = 50


@admin_get(
    HOME,
    opt={
        **ADMIN,
        "schemas": {"prefix": ID_PREFIX, "limit": {"type": "integer", "minimum": 1, "maximum": FOUND_MOST}},
    },
    summary="Find users",
    description="Users with any event whose id begins with `prefix`. It is not a pattern; case matters. A browser "
    "gets a page; if `prefix` is the whole id of a user, it gets the page of that user.",
)
async def get_users(
    request: HttpRequest,
    prefix: Annotated[str, QueryParameter(description="The beginning of the ids; empty for any.")] = "",
    limit: Annotated[
        int | None, QueryParameter(ge=1, le=FOUND_MOST, description=f"Default: {FOUND_BY_DEFAULT}.")
    ] = None,
) -> Response[UsersFound]:
    wanted, most = prefix_of(prefix), limit or FOUND_BY_DEFAULT
    found = await service_of(request).users.find(wanted, most + 1)
    body = UsersFound(wanted, found[:most], len(found) > most)
    if limit is None and found[:1] == [wanted] and prefers_page(request):
        return await redirect(request, f"{HOME}/{quote(wanted, safe='')}")
    return await answer(request, body, "users.html", most=FOUND_MOST, id_allowed=id_problem(wanted) is None)


@admin_get(
    f"{HOME}/{{user_id:str}}",
    summary="Look at a user",
    description="Each feature with its freshness and the result of a computation now, and the user's newest events. "
    "A page for a browser.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_user(request: HttpRequest, user_id: UserId) -> Response[UserView]:
    service = service_of(request)
    check_ids([user_id], "user_id")
    if prefers_page(request):
        return await _user_page(request, user_id)
    (inspection,) = await service.inspector.inspect([user_id])
    profile = _inspected(inspection)
    if inspection.cache == "trusted":  # otherwise a read would only repeat the computation of the inspection
        profile = (await service.reader.read({user_id: service.registry.full_mask}, patient=True))[user_id]
    return await answer(request, await _user_view(service, inspection, profile), "user.html")


async def _user_page(request: HttpRequest, user_id: str) -> Response[UserView]:
    service = service_of(request)
    (inspection,), holdings, development = await asyncio.gather(
        service.inspector.inspect([user_id]), service.users.holdings(user_id), user_development(service, user_id)
    )
    return await answer(
        request,
        await _user_view(service, inspection, _inspected(inspection)),
        "user.html",
        cache=inspection.cache,
        holdings=holdings,
        retention_days=service.settings.retention_days,
        development=development,
        **chart_context(development),
    )


def _inspected(inspection: Inspection) -> Profile:
    """The profile that a read would return, without filling the cache."""
    return {index: inspection.reading(index) for index in range(len(inspection.cells))}


async def _user_view(service: Service, inspection: Inspection, profile: Profile) -> UserView:
    events = await service.user_events.newest_events(inspection.user_id, NEWEST_EVENTS)
    return UserView(
        inspection.user_id,
        {cell.entry.name: _cell_state(cell, profile[index], inspection) for index, cell in enumerate(inspection.cells)},
        [_stored_event(item, service.registry) for item in events],
    )


def _cell_state(cell: InspectedCell, reading: FeatureValue, inspection: Inspection) -> CellState:
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
            held.version,
        )
        if held is not None
        else None,
        msgspec.json.decode(cell.outcome.json),
        cell.outcome.error,
        cell.difference,
        cell.disabled and cell.outcome.error is not None,
    )


def _stored_event(item: TracedEvent, registry: Registry) -> StoredEvent:
    event, received_at_ms = item.logged.event, item.logged.received_at_ms
    return StoredEvent(
        item.logged.seq,
        rfc3339(received_at_ms),
        msgspec.to_builtins(event),
        rfc3339(item.counted_at_ms),
        item.claimed_at_ms is not None,
        received_at_ms - to_ms(event.occurred_at),
        [name for name in registry.names if name in registry.invalidated_by(subject_of(event))],
        "dead letter" if item.letter_id is not None else "consumed" if item.consumed else "waiting",
        item.logged.attempts,
        item.letter_id,
    )


@admin_post(
    f"{HOME}/{{user_id:str}}/rebuild",
    opt={**ADMIN, "body": [UserRebuildRequest], "body_required": False},
    summary="Rebuild a user now",
    description="Rebuilds every feature, or those that the body names. Reads return the cached values meanwhile.",
    responses={
        200: ResponseSpec(ProfileAnswer, generate_examples=False, description="The profile, as with `detail=true`."),
        **problems(400, 401, 403, 413, 415, 422, 503, 507),
    },
)
async def rebuild_user(request: HttpRequest, user_id: UserId) -> Response[Any]:
    service = service_of(request)
    check_ids([user_id], "user_id")
    mask = selected(service.registry, await _features_to_rebuild(request))
    before = await service.inspector.live_values(user_id) if prefers_page(request) else None
    async with audited(request, "rebuild", user_hash(user_id)) as act:
        profile = (await service.rebuilder.rebuild([user_id], mask))[user_id]
        await service.clear_local_caches()
        if mask != service.registry.full_mask:
            act.outcome = "done: " + ", ".join(service.registry.names[index] for index in indices(mask))
    if not prefers_page(request):
        return Response(renderer_of(request).profile(user_id, profile, mask, detail=True), media_type=MediaType.JSON)
    rows = [
        (service.registry.names[index], before[index] if before is not None else None, profile[index])
        for index in indices(mask)
    ]
    return await page(
        request,
        "user_rebuilt.html",
        user_id=user_id,
        rows=rows,
        cache_unavailable=before is None,
        changed={name for name, before, after in rows if before is not None and before.json != after.json},
        kept=any(after.expires_at_ms is not None for _, _, after in rows),
    )


async def _features_to_rebuild(request: HttpRequest) -> list[str] | None:
    if is_form(request):
        return (await read_form(request)).all("features") or None
    return (await body_as(request, UserRebuildRequest)).features if await request.body() else None


@admin_get(
    f"{HOME}/{{user_id:str}}/erase",
    summary="See what erasing a user would delete",
    description="This deletes nothing. `DELETE /admin/users/{user_id}` erases.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_erasure(request: HttpRequest, user_id: UserId) -> Response[UserHoldings]:
    check_ids([user_id], "user_id")
    return await answer(request, await _holdings(service_of(request), user_id), "user_erase.html", refusal=None)


@form_post(f"{HOME}/{{user_id:str}}/erase")
async def erase_user_by_form(request: HttpRequest, user_id: UserId) -> Response[Any]:
    """Erase a user if the form holds the id, which the admin types to confirm."""
    check_ids([user_id], "user_id")
    if (await read_form(request)).get("confirm") not in (user_id, visible(user_id)):
        refusal = "Nothing was deleted: this is not the id of the user. Capitals and spaces matter."
        body = await _holdings(service_of(request), user_id)
        return await answer(request, body, "user_erase.html", status_code=422, refusal=refusal)
    erased = await _erase(request, user_id)
    return await page(request, "user_erased.html", user_id=user_id, erased=erased, hashed=user_hash(user_id))


@admin_delete(
    f"{HOME}/{{user_id:str}}",
    summary="Erase a user",
    description="Deletes the user's events, decisions, learned state, dead letters and cached values for good, and "
    "their events in jobs that wait in the queue. The audit trail keeps a hash of the id.",
    responses=problems(400, 401, 403, 422, 503, 507),
)
async def erase_user(request: HttpRequest, user_id: UserId) -> None:
    check_ids([user_id], "user_id")
    await _erase(request, user_id)


async def _holdings(service: Service, user_id: str) -> UserHoldings:
    values = await service.inspector.live_values(user_id)
    cached = sum(value is not None for value in values) if values is not None else None
    return UserHoldings(user_id, *await service.users.holdings(user_id), cached)


async def _erase(request: HttpRequest, user_id: str) -> Holdings:
    async with audited(request, "erase", user_hash(user_id)) as act:
        erased = await service_of(request).erasure.erase(user_id)
        act.outcome = f"done, {erased.events} events"
    return erased
