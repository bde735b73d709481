"""Admins' routes about one user, data quality and dead letters. Every change is audited."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from litestar import MediaType, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter

from app.api.auth import Caller
from app.api.context import Api, HttpRequest, api_of
from app.api.documents import ProfileAnswer, UserId, problems
from app.api.inputs import check_ids
from app.api.profiles import renderer
from app.api.schemas import (
    Ages,
    CellState,
    FeatureQuality,
    Letter,
    LetterList,
    Quality,
    Replayed,
    StoredEvent,
    UserView,
)
from app.errors import NotFound
from app.events.admission import decode_json
from app.events.ports import DeadLetter, LoggedEvent
from app.features.clock import rfc3339
from app.profiles.freshness import FeatureFreshness, distribution, percentiles

NEWEST_EVENTS = 50
LETTERS_PER_PAGE = 100
MAX_ROWID = 2**63 - 1


def caller(request: HttpRequest) -> Caller:
    """Who asks."""
    known: Caller = request.scope["user"]
    return known


def user_hash(user_id: str) -> str:
    """What the audit trail keeps of a user, who may be erased one day, or was just now."""
    return "user-sha256:" + hashlib.sha256(user_id.encode()).hexdigest()


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
    profiles = await api.rebuilder.rebuild([user_id], api.registry.full_mask)
    await api.recall()
    await api.audit(caller(request).name, "rebuild", user_hash(user_id), "done")
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
    events = await api.erase(user_id)
    await api.audit(caller(request).name, "erase", user_hash(user_id), f"done, {events} events")


@get(
    "/admin/data-quality",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Measure data quality",
    description="Over the users with any event in the last 30 days, per feature: how many values are fresh, missing "
    "or stale, how old they are and how they are distributed.",
    responses=problems(400, 401, 403, 503),
)
async def get_quality(request: HttpRequest) -> Quality:
    """All features."""
    api = api_of(request)
    report = await api.freshness.measure()
    features = {
        entry.name: _quality(api, index, report.features[entry.name], report.eligible, measured=report.measured)
        for index, entry in enumerate(api.registry)
    }
    return Quality(rfc3339(report.at_ms), report.eligible, features)


def _quality(api: Api, index: int, figures: FeatureFreshness, eligible: int, *, measured: bool) -> FeatureQuality:
    if not measured:
        return FeatureQuality(eligible, None, None, None, None, None, None)
    p50, p90, p99, most = percentiles(figures.ages_ms, (0.5, 0.9, 0.99, 1.0))
    live = figures.fresh + figures.stale
    return FeatureQuality(
        eligible,
        figures.fresh,
        figures.missing,
        figures.stale,
        figures.values[None] / live if live else None,
        Ages(p50, p90, p99, most),
        distribution(api.registry[index], figures.values),
    )


@get(
    "/admin/dead-letters",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="List dead letters",
    responses=problems(400, 401, 403, 503),
)
async def get_letters(
    request: HttpRequest,
    after: Annotated[int, QueryParameter(ge=0, le=MAX_ROWID, description="Only letters with a higher id.")] = 0,
) -> LetterList:
    """A page of them."""
    letters = await api_of(request).letters.list(after, LETTERS_PER_PAGE)
    more = letters[-1].id if len(letters) == LETTERS_PER_PAGE else None
    return LetterList([_letter(item) for item in letters], more)


@post(
    "/admin/dead-letters/{letter_id:int}/replay",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Replay a dead letter",
    description="Takes the payload in as an event, or gives a stored event to the workers again. "
    "A payload that is still no event stays where it is, and the answer says why.",
    responses=problems(400, 401, 403, 404, 409, 422, 503),
)
async def replay_letter(request: HttpRequest, letter_id: FromPath[int]) -> Replayed:
    """Try one again."""
    api = api_of(request)
    letter = await _found(api, letter_id)
    if letter.seq is not None:
        await api.letters.revive(letter_id)
        outcome = Replayed(0, 0, True)
    else:
        receipt = await api.ingestor.ingest(decode_json(letter.payload.encode()))
        await api.letters.discard(letter_id)
        outcome = Replayed(receipt.accepted, receipt.duplicates, False)
    await api.audit(caller(request).name, "replay", f"dead-letter:{letter_id}", "done")
    return outcome


@delete(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Discard a dead letter",
    responses=problems(400, 401, 403, 404, 503),
)
async def discard_letter(request: HttpRequest, letter_id: FromPath[int]) -> None:
    """Forget one."""
    api = api_of(request)
    if letter_id > MAX_ROWID or not await api.letters.discard(letter_id):
        raise NotFound(f"there is no dead letter {letter_id}")
    await api.audit(caller(request).name, "discard", f"dead-letter:{letter_id}", "done")


async def _found(api: Api, letter_id: int) -> DeadLetter:
    letter = await api.letters.get(letter_id) if letter_id <= MAX_ROWID else None
    if letter is None:
        raise NotFound(f"there is no dead letter {letter_id}")
    return letter


def _letter(item: DeadLetter) -> Letter:
    source: Any = item.source
    return Letter(
        item.id,
        source,
        item.payload,
        item.error,
        item.traceback,
        item.attempts,
        item.seq,
        rfc3339(item.created_at_ms),
        rfc3339(item.last_failed_at_ms),
    )
