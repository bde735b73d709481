"""Admins' routes about one user: look, rebuild, erase."""

from __future__ import annotations

import msgspec
from litestar import MediaType, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec

from app.api.admin.actors import audited, user_hash
from app.api.admin.schemas import CellState, StoredEvent, UserView
from app.api.context import HttpRequest, api_of
from app.api.documents import ProfileAnswer, UserId, problems
from app.api.inputs import check_ids
from app.api.profiles import renderer
from app.events.ports import LoggedEvent
from app.features.clock import rfc3339

NEWEST_EVENTS = 50


def stored(item: LoggedEvent) -> StoredEvent:
    """An event as admins see it."""
    return StoredEvent(item.seq, rfc3339(item.received_at_ms), msgspec.to_builtins(item.event))


@get(
    "/admin/users/{user_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Look at a user",
    description="Each feature with its freshness, and the user's newest events.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_user(request: HttpRequest, user_id: UserId) -> UserView:
    """One user."""
    api = api_of(request)
    check_ids([user_id], "user_id")
    states = await api.freshness.inspect(user_id)
    profile = (await api.reader.read({user_id: api.registry.full_mask}))[user_id]
    features = {}
    for index, entry in enumerate(api.registry):
        reading = profile[index]
        features[entry.name] = CellState(
            msgspec.json.decode(reading.json),
            entry.dtype,
            rfc3339(reading.computed_at_ms),
            rfc3339(reading.expires_at_ms) if reading.expires_at_ms is not None else None,
            "cache" if reading.cached else "computed",
            states[entry.name] if states is not None else None,
            list(entry.invalidated_by),
        )
    events = await api.users.newest_events(user_id, NEWEST_EVENTS)
    return UserView(user_id, features, [stored(item) for item in events])


@post(
    "/admin/users/{user_id:str}/rebuild",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Rebuild a user now",
    responses={
        200: ResponseSpec(ProfileAnswer, generate_examples=False, description="The profile, as with `detail=true`."),
        **problems(400, 401, 403, 422, 503),
    },
)
async def rebuild_user(request: HttpRequest, user_id: UserId) -> Response[bytes]:
    """Compute and cache every feature of one user."""
    api = api_of(request)
    check_ids([user_id], "user_id")
    async with audited(request, "rebuild", user_hash(user_id)):
        profiles = await api.rebuilder.rebuild([user_id], api.registry.full_mask)
        await api.recall()
    body = renderer(api).profile(user_id, profiles[user_id], api.registry.full_mask, detail=True)
    return Response(body, media_type=MediaType.JSON)


@delete(
    "/admin/users/{user_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Erase a user",
    description="Deletes the user's events and cached values for good. The audit trail keeps a hash of the id.",
    responses=problems(400, 401, 403, 422, 503),
)
async def erase_user(request: HttpRequest, user_id: UserId) -> None:
    """Erase one user."""
    api = api_of(request)
    check_ids([user_id], "user_id")
    async with audited(request, "erase", user_hash(user_id)) as act:
        act.outcome = f"done, {await api.erase(user_id)} events"
