"""Routes about decisions: rank candidate tips, and explain a stored decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

import msgspec
from litestar import MediaType, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import PathParameter
from msgspec import UNSET

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.openapi.parameters import USER_ID
from app.api.request_parsing import body_as, check_ids, issue_of, with_mirror
from app.api.schemas import Value
from app.api.scoring_schemas import (
    CandidateFeatures,
    DecidingPolicy,
    DecisionAnswer,
    Explained,
    OutcomeShown,
    ProfileOrigin,
    Ranked,
    ScoreAnswer,
    ScoreCandidate,
    ScoreRequest,
    ServingPolicy,
    ShadowShown,
    UsedContext,
    UsedProfile,
)
from app.bandit.decisions import MAX_CANDIDATES, Decision, DecisionOutcome, Origin, Ranking, ScoringRequest
from app.bandit.model.inputs import Candidate, Context, Profile
from app.errors import InvalidInput, Issue
from app.events.strict_json import decode
from app.features.clock import rfc3339
from app.service import Service

DecisionId = Annotated[str, PathParameter(description="The `decision_id` that `POST /score` returned.")]
# The most commas in a valid list of candidates, if no id contains a comma.
_MAX_COMMAS = MAX_CANDIDATES * 5
_encode = msgspec.json.Encoder().encode
_candidate_decoder = msgspec.json.Decoder(ScoreCandidate)


class _RawCandidates(msgspec.Struct):
    candidates: list[msgspec.Raw]


@post(
    "/score",
    status_code=200,
    opt={"scope": "read", "body": [ScoreRequest]},
    tags=["Tips"],
    summary="Rank candidate tips",
    description="Ranks 1 to 100 candidates for a user by expected reward and chooses one, usually the first. The "
    "decision is stored before the response is sent. Send its `decision_id` with the events about the tip, so that the "
    "policy learns from them. Without `profile_features` the service reads the user's profile; unknown features are "
    "ignored.",
    response_description="The stored decision.",
    responses={
        200: ResponseSpec(ScoreAnswer, generate_examples=False),
        **problems(400, 401, 403, 413, 415, 422, 503, 507),
    },
)
async def post_score(request: HttpRequest) -> Response[bytes]:
    service = service_of(request)
    decision = await service.bandit.scorer.score(await _scoring_request(request, service))
    return Response(_encode(_answer(decision)), media_type=MediaType.JSON)


@get(
    "/decisions/{decision_id:str}",
    opt={"scope": "read", "schemas": {"decision_id": USER_ID}},
    tags=["Tips"],
    summary="Explain a decision",
    description="Returns the request, what each input contributed to each score, the probability of each candidate, "
    "the scores of the other policy, and the outcome.",
    responses=problems(400, 401, 403, 404, 422, 503),
)
async def get_decision(request: HttpRequest, decision_id: DecisionId) -> DecisionAnswer:
    check_ids([decision_id], "decision_id")
    decision, outcome = await service_of(request).bandit.scorer.explain(decision_id)
    return _explanation(decision, outcome)


def _answer(decision: Decision) -> ScoreAnswer:
    ranked = _ranked(decision, decision.ranking)
    return ScoreAnswer(
        decision.id,
        decision.chosen_id,
        sorted(ranked, key=lambda item: -item.score),  # stable: ties keep the order of the request
        ServingPolicy(decision.served_by, decision.policy_hash, decision.state_version),
        ProfileOrigin(decision.origin),
    )


def _ranked(decision: Decision, ranking: Ranking) -> list[Ranked]:
    return [
        Ranked(candidate.id, score, probability)
        for candidate, score, probability in zip(
            decision.candidates, ranking.scores.tolist(), ranking.pi.tolist(), strict=True
        )
    ]


def _explanation(decision: Decision, outcome: DecisionOutcome) -> DecisionAnswer:
    at = decision.context.at
    return DecisionAnswer(
        decision_id=decision.id,
        decided_at=rfc3339(decision.created_at_ms),
        user_id=decision.user_id,
        request_id=decision.request_id,
        explore=decision.explore,
        chosen_id=decision.chosen_id,
        policy=DecidingPolicy(
            decision.served_by, decision.role, decision.policy_hash, decision.state_version, decision.prior_version
        ),
        profile=_used_profile(decision),
        context=UsedContext(None if at is None else at.isoformat()),
        candidates=_explained(decision),
        shadow=_shadow(decision),
        outcome=_outcome(outcome),
    )


def _used_profile(decision: Decision) -> UsedProfile:
    read = decision.profile_read
    return UsedProfile(
        decision.origin,
        None if decision.profile is None else cast(dict[str, Value], dict(decision.profile)),
        None if read is None else rfc3339(read.at_ms),
        None if read is None else {name: value.version for name, value in read.values.items()},
    )


def _explained(decision: Decision) -> list[Explained]:
    ranked = _ranked(decision, decision.ranking)
    contributions = decision.contributions()
    return [
        Explained(
            item.id,
            CandidateFeatures(is_overdue=item.is_overdue, task_age_days=item.task_age_days, priority=item.priority),
            ranked[place].score,
            ranked[place].probability,
            contributions[place] if contributions is not None else None,
        )
        for place, item in enumerate(decision.candidates)
    ]


def _shadow(decision: Decision) -> ShadowShown | None:
    other = decision.challenger if decision.role == "champion" else decision.champion
    if other is None:
        return None
    return ShadowShown("challenger" if decision.role == "champion" else "champion", _ranked(decision, other))


def _outcome(outcome: DecisionOutcome) -> OutcomeShown:
    return OutcomeShown(
        state=outcome.state,
        served_at=_time(outcome.served_at_ms),
        reward=outcome.reward,
        source=outcome.source,
        action=outcome.action,
        settled_at=_time(outcome.settled_at_ms),
        late=outcome.events.get("late", 0),
        repeated=outcome.events.get("repeated", 0),
        other_tip=outcome.events.get("other tip", 0),
    )


def _time(moment_ms: int | None) -> str | None:
    return None if moment_ms is None else rfc3339(moment_ms)


async def _scoring_request(request: HttpRequest, service: Service) -> ScoringRequest:
    """Decode and check the body of `POST /score`. Raises the errors of `body_as`, with every invalid candidate."""
    try:
        sent = await body_as(request, with_mirror(ScoreRequest, service.mirror))
    except InvalidInput as error:
        if error.issues[0].path.startswith("candidates["):  # msgspec stops at the first invalid candidate
            raise InvalidInput(str(error), _candidate_issues(await request.body()) or error.issues) from error
        raise
    check_ids([sent.user_id], "user_id")
    if sent.request_id is not None:
        check_ids([sent.request_id], "request_id")
    ids = [candidate.id for candidate in sent.candidates]
    check_ids(ids, "candidates[{}].id")
    if len(set(ids)) != len(ids):
        raise InvalidInput("several candidates have the same id", _repeated(ids))
    origin, profile = _profile(service, sent)
    return ScoringRequest(
        user_id=sent.user_id,
        candidates=tuple(
            Candidate(item.id, item.features.is_overdue, item.features.task_age_days, item.features.priority)
            for item in sent.candidates
        ),
        context=Context(sent.context.at if sent.context is not None else None),
        origin=origin,
        profile=profile,
        explore=sent.explore,
        request_id=sent.request_id,
    )


def _profile(service: Service, sent: ScoreRequest) -> tuple[Origin, Profile]:
    features = sent.profile_features
    if features is UNSET:
        return "service", None
    if features is None:
        return "absent", None
    given = {name: getattr(features, name) for name in service.registry.names}
    return "request", {name: value for name, value in given.items() if value is not UNSET}


def _candidate_issues(body: bytes) -> list[Issue]:
    """An issue for each invalid candidate in the body; empty if the list is too long to decode each candidate."""
    if body.count(b",") > _MAX_COMMAS:
        return []
    try:
        sent = msgspec.json.decode(body, type=_RawCandidates).candidates
    except msgspec.ValidationError:  # `candidates` occurs twice, and the second is not a list
        return []
    issues: list[Issue] = []
    for index, raw in enumerate(sent):
        try:
            decode(raw, _candidate_decoder)
        except msgspec.ValidationError as error:
            found = issue_of(str(error))
            path = f"candidates[{index}]" + ("" if found.path == "$" else f".{found.path}")
            issues.append(Issue(path, found.detail))
    return issues


def _repeated(ids: Sequence[str]) -> list[Issue]:
    first: dict[str, int] = {}
    return [
        Issue(f"candidates[{index}].id", f"is also the id of candidates[{first[value]}]")
        for index, value in enumerate(ids)
        if first.setdefault(value, index) != index
    ]
