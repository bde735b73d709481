"""Routes that read profiles (of one user, of many users, as a training set), and the list of features."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Annotated, Any, TypeVar, cast

import msgspec
from litestar import Response, get, post
from litestar.params import QueryParameter
from msgspec import UNSET

from app.api.dependencies import HttpRequest, cancelled_on_disconnect
from app.api.openapi import MOMENT, UserId
from app.api.request_parsing import body_as, check_ids, known_ms, moment_ms, stale_if_error_s
from app.api.schemas import (
    BatchAnswer,
    BatchRequest,
    DetailedProfileAnswer,
    FeatureEntry,
    FeatureList,
    HistoryAnswer,
    HistoryRequest,
    HistoryRequestRow,
    HistoryRow,
    ProfileAnswer,
)
from app.errors import InvalidInput, Issue, StoreUnavailable, Undecodable, UnknownFeature
from app.features.clock import rfc3339, to_ms
from app.features.export import catalogue_entry
from app.features.registry import indices
from app.profiles.history import Moments, served_row
from app.profiles.online.cache_protocol import Profile, failures
from app.profiles.ports import ComputeRow, LoggedProfile
from app.service import Service
from app.telemetry import logger

T = TypeVar("T")
ROWS_PER_STEP = 256  # of a training set, about 2 ms
READ_PROFILE: dict[str, Any] = {
    "scope": "read",
    "stale_if_error": True,
    "problems": {400: "Or a time lies in the future or before the kept history, or `as_of` is missing."},
}
Selection = Annotated[str | None, QueryParameter(description="Comma-separated feature names. Default: all features.")]
AsOf = Annotated[
    str | None,
    QueryParameter(description="RFC 3339. Only events up to and including this time count.", schema_extra=MOMENT),
]
KnownAt = Annotated[
    str | None,
    QueryParameter(description="Ignore events that arrived later; only together with `as_of`.", schema_extra=MOMENT),
]
log = logger("api")


@get(
    "/profiles/{user_id:str}",
    opt=READ_PROFILE,
    tags=["Profiles"],
    summary="Read one profile",
    description="Returns the user's features. They reflect every event acknowledged before the request. An unknown "
    "user is not an error: the response is 200 with the default of each feature. With `?detail=true`, the response is "
    "that of `/profiles/{user_id}/detail`.",
)
async def get_profile(
    request: HttpRequest,
    user_id: UserId,
    features: Selection = None,
    # Not documented, because it changes the response's schema: generators need another operation for that.
    detail: Annotated[bool, QueryParameter(include_in_schema=False)] = False,
    as_of: AsOf = None,
    known_at: KnownAt = None,
) -> Response[ProfileAnswer]:
    return await _read_profile(request, user_id, features, as_of, known_at, detail=detail)


@get(
    "/profiles/{user_id:str}/detail",
    opt=READ_PROFILE,
    tags=["Profiles"],
    summary="Read one profile with its details",
    description="Returns the value, dtype, times and origin of each feature of the user.",
)
async def get_profile_detail(
    request: HttpRequest, user_id: UserId, features: Selection = None, as_of: AsOf = None, known_at: KnownAt = None
) -> Response[DetailedProfileAnswer]:
    return await _read_profile(request, user_id, features, as_of, known_at, detail=True)


async def _read_profile(
    request: HttpRequest, user_id: str, features: str | None, as_of: str | None, known_at: str | None, *, detail: bool
) -> Response[Any]:
    service = request.service
    try:
        mask = service.registry.mask(features.split(",") if features is not None else None)
    except UnknownFeature as error:
        raise Undecodable(str(error), error.issues) from error  # 400 for a value in the query
    headers = None
    if as_of is not None:
        moment = moment_ms(as_of, "as_of")
        known = moment_ms(known_at, "known_at") if known_at is not None else None
        moments = await service.moments()
        problem = moments.problem(moment, mask) or (moments.future(known, "known_at") if known is not None else None)
        if problem is not None:
            raise Undecodable(f"{problem.path} {problem.detail}", [problem])
        async with cancelled_on_disconnect(request):
            (profile,) = await service.reader.read_as_of([ComputeRow(user_id, mask, moment, known)])
    elif known_at is not None:
        raise Undecodable("known_at requires as_of", [Issue("known_at", "is allowed only together with as_of")])
    else:
        wanted = {user_id: mask}
        try:
            found = await service.reader.read(wanted)
        except StoreUnavailable as error:
            found, headers = await _read_unproven(request, wanted, error)
        profile = found[user_id]
    return Response(request.parts.renderer.profile(user_id, profile, mask, detail=detail), headers=headers)


@post(
    "/profiles/batch",
    status_code=200,
    opt={"scope": "read", "body": [BatchRequest], "stale_if_error": True},
    tags=["Profiles"],
    summary="Read many profiles",
    description="Returns the profiles of up to 1,000 users, in the order of `user_ids`; an id may repeat.",
)
async def post_batch(request: HttpRequest) -> Response[BatchAnswer]:
    asked = await body_as(request, BatchRequest)
    check_ids(asked.user_ids, "user_ids[{}]")
    mask = request.service.registry.mask(asked.features)
    wanted = dict.fromkeys(asked.user_ids, mask)
    headers = None
    try:
        values = await request.service.reader.read_values(wanted)
    except StoreUnavailable as error:
        found, headers = await _read_unproven(request, wanted, error)
        values = {user_id: [profile[index].json for index in indices(mask)] for user_id, profile in found.items()}
    body: Any = request.parts.renderer.batch(asked.user_ids, values, mask)
    return Response(body, headers=headers)


@post(
    "/profiles/history",
    status_code=200,
    opt={"scope": "read", "body": [HistoryRequest]},
    problems={422: "Or a time lies in the future or before the kept history, or a decision is unknown."},
    tags=["Profiles"],
    summary="Build a training set",
    description="Returns each row's features as of its own moment, computed by the same SQL as online reads. Events "
    "at exactly that moment count. To exclude the event that a label is made of, set `as_of` one millisecond earlier. "
    "A row with a `decision_id` instead has the values that the decision was made from; only features that it did not "
    "read, or whose definition has changed, are computed.",
)
async def post_history(request: HttpRequest) -> HistoryAnswer:
    service = request.service
    wanted = await body_as(request, HistoryRequest)
    mask = service.registry.mask(wanted.features)
    known = known_ms(wanted.known_at) if wanted.known_at not in (None, "as_of") else wanted.known_at
    moments = await service.moments()
    if isinstance(known, int) and (problem := moments.future(known, "known_at")) is not None:
        raise InvalidInput("known_at is invalid", [problem])
    ids = [row.decision_id for row in wanted.rows if row.decision_id is not UNSET]
    decisions = await service.logged_profiles.by_id(ids) if ids else {}
    found: list[tuple[Profile, ComputeRow]] = []
    issues: list[Issue] = []
    async for index, row in _in_steps(enumerate(wanted.rows)):
        try:
            found.append(_history_row(row, f"rows[{index}]", moments, mask, known, decisions))
        except InvalidInput as error:
            issues += error.issues
    if issues:
        raise InvalidInput("a row is invalid", issues)
    async with cancelled_on_disconnect(request):
        computed = await service.reader.read_as_of([row for _, row in found])
    render = request.parts.renderer.values
    rows: list[HistoryRow] = []
    failed: dict[str, str] = {}
    async for (served, at), others in _in_steps(zip(found, computed, strict=True)):
        profile = served | others
        rows.append(HistoryRow(at.user_id, rfc3339(at.now_ms or 0), cast(Any, msgspec.Raw(render(profile, mask)))))
        failed = failures(service.registry, [profile]) | failed
    return HistoryAnswer(rows, failed or UNSET)


async def _in_steps(rows: Iterable[T]) -> AsyncIterator[T]:
    """Yield the rows, and let other requests run after every `ROWS_PER_STEP` of them."""
    for number, row in enumerate(rows, start=1):
        yield row
        if number % ROWS_PER_STEP == 0:
            await asyncio.sleep(0)


def _history_row(
    row: HistoryRequestRow,
    place: str,
    moments: Moments,
    mask: int,
    known: int | str | None,
    decisions: Mapping[str, LoggedProfile],
) -> tuple[Profile, ComputeRow]:
    """Return the values that the decision of a row recorded (none if the row names no decision), and a `ComputeRow` for
    the other features in `mask`. A row without a decision ignores events that arrived after `known` (epoch ms, or
    `as_of`: the row's own time). `place` is the row's path in issues, such as `rows[3]`. Raises `InvalidInput`."""
    names = {"user_id": row.user_id, "as_of": row.as_of}
    if row.decision_id is not UNSET:
        detail = "is not allowed together with decision_id"
        if issues := [Issue(f"{place}.{name}", detail) for name, value in names.items() if value is not UNSET]:
            raise InvalidInput("a row is invalid", issues)
        return served_row(decisions.get(row.decision_id), f"{place}.decision_id", moments, mask)
    if row.user_id is UNSET or row.as_of is UNSET:
        missing = next(name for name, value in names.items() if value is UNSET)
        detail = "missing; a row has user_id and as_of, or decision_id"
        raise InvalidInput("a row is invalid", [Issue(f"{place}.{missing}", detail)])
    check_ids([row.user_id], f"{place}.user_id")
    at_ms = to_ms(row.as_of)
    if (problem := moments.problem(at_ms, mask, f"{place}.as_of")) is not None:
        raise InvalidInput("a moment is invalid", [problem])
    return {}, ComputeRow(row.user_id, mask, at_ms, at_ms if isinstance(known, str) else known)


@get("/features", opt={"scope": "read"}, tags=["Profiles"], summary="List the features")
async def get_features(request: HttpRequest) -> FeatureList:
    return FeatureList([feature_entry(request.service, index) for index in range(len(request.service.registry))])


def feature_entry(service: Service, index: int) -> FeatureEntry:
    """The registry's entry of a feature, with its cost and state (ok, failing, disabled) in this process."""
    entry, availability = service.registry[index], service.computation.availability
    reason = availability.reason(index)
    cost = service.costs.get(index)
    return FeatureEntry(
        **catalogue_entry(entry),
        us_per_user=round(cost, 1) if cost is not None else None,
        state="disabled" if availability.disabled >> index & 1 else "failing" if reason else "ok",
        reason=reason or None,
    )


async def _read_unproven(
    request: HttpRequest, wanted: Mapping[str, int], error: StoreUnavailable
) -> tuple[dict[str, Profile], dict[str, str]]:
    """Profiles from the cache for a read that failed with `error`, and the response headers that mark them as possibly
    outdated. `wanted` maps user ids to masks of features. Raises `error` if the request has no `stale-if-error` in
    `Cache-Control`, or if the cache lacks a value or holds one that is too old for `stale-if-error`."""
    service, max_age_s = request.service, stale_if_error_s(request)
    found = await service.reader.read_unproven(wanted, max_age_s) if max_age_s is not None else None
    if found is None:
        raise error
    log.warning("served_unproven", users=len(found), error=str(error))
    oldest_ms = min(value.computed_at_ms for profile in found.values() for value in profile.values() if value.cached)
    age_s = max(0, service.clock.now_ms() - oldest_ms) // 1000
    return found, {"Cache-Status": "profiles; hit; detail=unproven", "Age": str(age_s)}
