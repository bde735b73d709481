"""The recommender's routes about decisions: rank candidates, and explain what was decided."""

from __future__ import annotations

from typing import Annotated, cast

import msgspec
from litestar import MediaType, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import PathParameter

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.openapi.parameters import USER_ID
from app.api.request_parsing import check_ids
from app.api.schemas import Value
from app.api.scoring_inputs import asked_of
from app.api.scoring_schemas import (
    CandidateFeatures,
    DecidingPolicy,
    DecisionAnswer,
    Explained,
    OutcomeShown,
    ProfileOrigin,
    Ranked,
    ScoreAnswer,
    ScoreRequest,
    ServingPolicy,
    ShadowShown,
    UsedContext,
    UsedProfile,
)
from app.bandit.decisions import Decision, DecisionOutcome, Ranking
from app.features.clock import rfc3339

DecisionId = Annotated[str, PathParameter(description="As `POST /score` answered it.")]
_encode = msgspec.json.Encoder().encode


@post(
    "/score",
    status_code=200,
    opt={"scope": "read", "body": [ScoreRequest]},
    tags=["Tips"],
    summary="Rank candidate tips",
    description="Ranks 1 to 100 candidates for a user by expected reward, and chooses one, mostly the best. The "
    "decision is stored before it is answered. Send its `decision_id` with the events about the tip, and it is learned "
    "from. Where `profile_features` is not given, the user's profile is read; unknown features are ignored.",
    response_description="The decision, stored for good.",
    responses={
        200: ResponseSpec(ScoreAnswer, generate_examples=False),
        **problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
    },
)
async def post_score(request: HttpRequest) -> Response[bytes]:
    """Decide."""
    service = service_of(request)
    decision = await service.bandit.scorer.score(await asked_of(request, service))
    return Response(_encode(_answer(decision)), media_type=MediaType.JSON)


@get(
    "/decisions/{decision_id:str}",
    opt={"scope": "read", "schemas": {"decision_id": USER_ID}},
    tags=["Tips"],
    summary="Explain a decision",
    description="What was asked, what each input added to each score, with which probability the tip was chosen, what "
    "the other policy would have done, and what came of it.",
    responses=problems(400, 401, 403, 404, 422, 503),
)
async def get_decision(request: HttpRequest, decision_id: DecisionId) -> DecisionAnswer:
    """Explain."""
    check_ids([decision_id], "decision_id")
    decision, outcome = await service_of(request).bandit.scorer.explain(decision_id)
    return _explanation(decision, outcome)


def _answer(decision: Decision) -> ScoreAnswer:
    ranked = _ranked(decision, decision.ranking)
    return ScoreAnswer(
        decision.id,
        decision.chosen_id,
        sorted(ranked, key=lambda item: -item.score),  # stable: those that tie stay in the order sent
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
        profile=UsedProfile(
            decision.origin, None if decision.profile is None else cast(dict[str, Value], dict(decision.profile))
        ),
        context=UsedContext(None if at is None else at.isoformat()),
        candidates=_explained(decision),
        shadow=_shadow(decision),
        outcome=_outcome(outcome),
    )


def _explained(decision: Decision) -> list[Explained]:
    found = decision.contributions()
    return [
        Explained(
            candidate.id,
            CandidateFeatures(
                is_overdue=candidate.is_overdue,
                task_age_days=candidate.task_age_days,
                priority=candidate.priority,
            ),
            ranked.score,
            ranked.probability,
            None if found is None else found[place],
        )
        for place, (candidate, ranked) in enumerate(
            zip(decision.candidates, _ranked(decision, decision.ranking), strict=True)
        )
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
