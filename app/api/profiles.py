"""The recommender's routes: one profile, many, and the training set."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import MediaType, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from app.api.dependencies import HttpRequest, renderer_of, selected, service_of
from app.api.disconnect import cancelled_on_disconnect
from app.api.openapi.document import BatchAnswer, HistoryAnswer, ProfileAnswer, UserId, problems
from app.api.openapi.parameters import MOMENT
from app.api.openapi.parameters import feature_names as feature_names_schema
from app.api.request_parsing import body_as, check_ids, feature_names, known_ms, moment_ms
from app.api.schemas import BatchRequest, FeatureEntry, FeatureList, HistoryRequest
from app.errors import InvalidInput, Issue, Undecodable, UnknownFeature
from app.features.clock import rfc3339, to_ms
from app.features.export import catalogue_entry
from app.profiles.history.validation import Moments
from app.profiles.online.cache_protocol import failures
from app.profiles.ports import ComputeRow
from app.service import Service

AS_OF_DETAIL = "Only events up to this time, those at it included, RFC 3339. Computed, never cached."
KNOWN_AT_DETAIL = "Also leave out events that arrived after this time. Goes with `as_of`."


def _json(body: bytes) -> Response[bytes]:
    return Response(body, media_type=MediaType.JSON)


@get(
    "/profiles/{user_id:str}",
    opt={"scope": "read", "schemas": {"features": feature_names_schema, "as_of": MOMENT, "known_at": MOMENT}},
    tags=["Profiles"],
    summary="Read one profile",
    description="The user's features, as of now: never older than the last event that was acknowledged. "
    "A user never heard of is a cold user: 200, with defaults.",
    responses={200: ResponseSpec(ProfileAnswer, generate_examples=False), **problems(400, 401, 403, 422, 503)},
)
async def get_profile(
    request: HttpRequest,
    user_id: UserId,
    features: Annotated[
        str | None, QueryParameter(description="Comma-separated names; all where it is not given.")
    ] = None,
    detail: Annotated[bool, QueryParameter(description="Per feature: value, dtype, times, origin.")] = False,
    as_of: Annotated[str | None, QueryParameter(description=AS_OF_DETAIL)] = None,
    known_at: Annotated[str | None, QueryParameter(description=KNOWN_AT_DETAIL)] = None,
) -> Response[bytes]:
    """One profile."""
    service = service_of(request)
    check_ids([user_id], "user_id")
    try:
        mask = selected(service.registry, feature_names(features))
    except UnknownFeature as error:
        raise Undecodable(str(error), error.issues) from error  # a value that the query does not allow
    if as_of is not None:
        moment = moment_ms(as_of, "as_of")
        known = moment_ms(known_at, "known_at") if known_at is not None else None
        if problem := _moment_problem(service, moment, known, mask):
            raise Undecodable(f"{problem.path} {problem.detail}", [problem])
        async with cancelled_on_disconnect(request):
            (profile,) = await service.reader.read_as_of([ComputeRow(user_id, mask, moment, known)])
    elif known_at is not None:
        raise Undecodable("known_at goes with as_of", [Issue("known_at", "is allowed only together with as_of")])
    else:
        profile = (await service.reader.read({user_id: mask}))[user_id]
    return _json(renderer_of(request).profile(user_id, profile, mask, detail=detail))


@post(
    "/profiles/batch",
    status_code=200,
    opt={"scope": "read", "body": [BatchRequest]},
    tags=["Profiles"],
    summary="Read many profiles",
    description="Up to 1,000 users at once, answered in the order asked, repeats included.",
    responses={200: ResponseSpec(BatchAnswer, generate_examples=False), **problems(400, 401, 403, 413, 415, 422, 503)},
)
async def post_batch(request: HttpRequest) -> Response[bytes]:
    """Many profiles."""
    service = service_of(request)
    asked = await body_as(request, BatchRequest)
    check_ids(asked.user_ids, "user_ids[{}]")
    mask = selected(service.registry, asked.features)
    values = await service.reader.read_values(dict.fromkeys(asked.user_ids, mask))
    return _json(renderer_of(request).batch(asked.user_ids, values, mask))


@post(
    "/profiles/history",
    status_code=200,
    opt={"scope": "read", "body": [HistoryRequest]},
    tags=["Profiles"],
    summary="Build a training set",
    description="Each row's features as they were at its own moment, by the same SQL that serves the online read. "
    "Events at that very moment count; to leave out the one that a label is made of, ask a millisecond earlier.",
    responses={
        200: ResponseSpec(HistoryAnswer, generate_examples=False),
        **problems(400, 401, 403, 413, 415, 422, 503),
    },
)
async def post_history(request: HttpRequest) -> Response[bytes]:
    """Many past moments."""
    service = service_of(request)
    wanted = await body_as(request, HistoryRequest)
    check_ids([row.user_id for row in wanted.rows], "rows[{}].user_id")
    mask = selected(service.registry, wanted.features)
    known_for_all = known_ms(wanted.known_at)
    asked: list[ComputeRow] = []
    issues: list[Issue] = []
    for index, row in enumerate(wanted.rows):
        moment = to_ms(row.as_of)
        known = moment if wanted.known_at == "as_of" else known_for_all
        if problem := _moment_problem(service, moment, known, mask):
            path = f"rows[{index}].as_of" if problem.path == "as_of" else "known_at"
            issues.append(Issue(path, problem.detail))
        asked.append(ComputeRow(row.user_id, mask, moment, known))
    if issues:
        raise InvalidInput("a moment is not allowed", issues)
    async with cancelled_on_disconnect(request):
        profiles = await service.reader.read_as_of(asked)
    render = renderer_of(request).values
    rows = [
        b'{"user_id":%b,"as_of":"%b","features":%b}'
        % (msgspec.json.encode(row.user_id), rfc3339(row.now_ms or 0).encode(), render(profile, mask))
        for row, profile in zip(asked, profiles, strict=True)
    ]
    failed = failures(service.registry, profiles)
    told = b',"failed":' + msgspec.json.encode(failed) if failed else b""
    return _json(b'{"rows":[' + b",".join(rows) + b"]" + told + b"}")


@get(
    "/features",
    opt={"scope": "read"},
    tags=["Profiles"],
    summary="List the features",
    responses=problems(400, 401, 403),
)
async def get_features(request: HttpRequest) -> FeatureList:
    """The registry."""
    service = service_of(request)
    return FeatureList([feature_entry(service, index) for index in range(len(service.registry))])


def feature_entry(service: Service, index: int) -> FeatureEntry:
    """An entry of the registry as it stands in this process."""
    entry, availability = service.registry[index], service.computation.availability
    reason = availability.reason(index)
    cost = service.costs.get(index)
    return FeatureEntry(
        **catalogue_entry(entry),
        us_per_user=round(cost, 1) if cost is not None else None,
        state="disabled" if availability.disabled >> index & 1 else "failing" if reason else "ok",
        reason=reason or None,
    )


def _moment_problem(service: Service, at_ms: int, known_at_ms: int | None, mask: int) -> Issue | None:
    return Moments(service.registry, service.settings.retention_days, service.clock).problem(at_ms, known_at_ms, mask)
