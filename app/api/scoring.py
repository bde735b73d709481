"""Routes about decisions: rank candidate tips, and explain a stored decision."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Annotated, Any, Literal

import msgspec
from litestar import MediaType, Response, get, post
from litestar.params import PathParameter
from msgspec import UNSET, Meta, UnsetType

from app.api.dependencies import HttpRequest
from app.api.middleware.fast_path import Answer
from app.api.openapi import USER_ID
from app.api.request_parsing import body_as, check_ids, with_mirror
from app.api.schemas import Moment, Value
from app.bandit.decisions import MAX_CANDIDATES, Decision, DecisionContext, DecisionOutcome, Origin, ScoringRequest
from app.bandit.model.inputs import Candidate, Context, Features
from app.bandit.model.thompson_sampling import OTHER, Ranking, Role
from app.bandit.scoring import Scorer
from app.errors import InvalidInput, Issue
from app.events.strict_json import UNDECODABLE, decode, issue_of
from app.features.clock import rfc3339
from app.features.events import Action
from app.features.ids import Id
from app.features.schema import ProfileFeatures
from app.features.views import view
from app.settings.parsers import ApiKey

Probability = Annotated[float, Meta(ge=0, le=1)]
TWO_TIPS = [
    {"id": "t-1", "features": {"is_overdue": True, "task_age_days": 3.5, "priority": 2}},
    {"id": "t-2", "features": {"is_overdue": False, "task_age_days": 12, "priority": 1}},
]
PROFILE = {"completion_rate_30d": 0.7, "preferred_hour": 9, "tip_volume_30d": 24}


class CandidateFeatures(Features, frozen=True, forbid_unknown_fields=True):
    """The features of a candidate, from which the policy computes its score."""


class ScoreCandidate(Candidate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tip that may be shown, with its features."""

    id: Id
    features: CandidateFeatures


class ScoreContext(Context, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The circumstances of the decision. `at`: when the tip is shown, with the user's UTC offset."""

    at: Moment | None = None


class ScoreRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rank candidate tips for a user."""

    user_id: Annotated[Id, Meta(examples=["ada"])]
    candidates: Annotated[
        list[ScoreCandidate],
        Meta(min_length=1, max_length=MAX_CANDIDATES, description="The ids must be unique.", examples=[TWO_TIPS]),
    ]
    request_id: Annotated[
        Id | None, Meta(description="Idempotency key: repeating it for the same user returns the stored decision.")
    ] = None
    context: ScoreContext | None = None
    profile_features: Annotated[
        ProfileFeatures | UnsetType | None,
        Meta(description="Not given: the service reads it. Null: score without a profile.", examples=[PROFILE]),
    ] = UNSET
    explore: Annotated[
        bool, Meta(description="False: choose the highest mean score. Such decisions are not evaluated.")
    ] = True


class RankedCandidate(msgspec.Struct):
    """A candidate with its expected reward and the probability that the policy chooses it."""

    id: str
    score: float
    probability: Probability


class ServingPolicy(msgspec.Struct):
    """The policy that decided. `state_version`: how many decisions of the user it had learned from."""

    id: str
    spec_hash: str
    state_version: int


class ProfileOrigin(msgspec.Struct):
    """The origin of the profile. `request`: sent with the request. `service`: read by the service. `absent`: none."""

    origin: Origin


class ScoreAnswer(msgspec.Struct):
    """A decision. The ranking is by score; the chosen candidate is not always the first."""

    decision_id: str
    chosen_id: str
    ranking: list[RankedCandidate]
    policy: ServingPolicy
    profile: ProfileOrigin


class DecidingPolicy(ServingPolicy, kw_only=True):
    """The policy that decided. `prior_version`: the version of the prior, pooled over all users; 0 if none existed."""

    role: Role
    prior_version: int


class DecisionProfile(ProfileOrigin):
    """The profile that the policy used. If the service read it, all its values were true at `read_at`. `versions` has,
    for each value, the number of the newest event of the user that the value reflects; 0 if it reflects none."""

    features: dict[str, Value] | None
    read_at: str | None
    versions: dict[str, int] | None


class ExplainedCandidate(RankedCandidate, kw_only=True):
    """A candidate of the request. The contributions of the policy's inputs sum to the score."""

    features: CandidateFeatures
    contributions: Annotated[dict[str, float] | None, Meta(description="Null if a release with other inputs decided.")]


class ShadowRanking(msgspec.Struct):
    """The candidates in the order of the request, as scored by the other policy, which did not make the decision."""

    role: Role
    candidates: list[RankedCandidate]


class DecisionOutcomeView(msgspec.Struct):
    """What happened after the decision. Events from which the policy does not learn are counted: `late` (after the time
    allowed), `repeated` (reported before) and `other_tip` (about another tip than the chosen one)."""

    state: Annotated[
        Literal["open", "served", "learned", "expired"],
        Meta(description="`open`: not served yet. `served`: waiting for feedback. `expired`: never served."),
    ]
    served_at: str | None
    reward: float | None
    source: Annotated[Literal["feedback", "default"] | None, Meta(description="`default`: no feedback in time.")]
    action: Action | None
    settled_at: str | None
    late: int
    repeated: int
    other_tip: int


class DecisionAnswer(msgspec.Struct):
    """A stored decision with its explanation and outcome."""

    decision_id: str
    decided_at: str
    user_id: str
    request_id: str | None
    explore: bool
    chosen_id: str
    policy: DecidingPolicy
    profile: DecisionProfile
    context: DecisionContext
    candidates: Annotated[list[ExplainedCandidate], Meta(description="In the order of the request.")]
    shadow: Annotated[ShadowRanking | None, Meta(description="Null until it is computed.")]
    outcome: DecisionOutcomeView


DecisionId = Annotated[
    str, PathParameter(description="The `decision_id` that `POST /score` returned.", schema_extra=USER_ID)
]
# The most commas in a valid list of candidates, if no text contains a comma.
_MAX_COMMAS = MAX_CANDIDATES * (2 + len(CandidateFeatures.__struct_fields__))
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
    problems={422: "Or two candidates have the same id.", 507: None},
)
async def post_score(request: HttpRequest) -> Response[ScoreAnswer]:
    try:
        sent = await body_as(request, with_mirror(ScoreRequest, request.service.mirror))
    except InvalidInput as error:
        if error.issues[0].path.startswith("candidates["):  # msgspec stops at the first invalid candidate
            raise InvalidInput(str(error), _candidate_issues(await request.body()) or error.issues) from error
        raise
    answer: Any = await _score(request.service.bandit.scorer, sent)
    return Response(answer, media_type=MediaType.JSON)


def plain_scores(scorer: Scorer, mirror: type[msgspec.Struct]) -> Answer:
    """A function that answers the body of `POST /score` as the route does. It returns None if the body cannot be
    decoded, so that the route reports the error, and raises the other errors itself."""
    decode_request = msgspec.json.Decoder(with_mirror(ScoreRequest, mirror)).decode

    async def answer(body: bytes, _: ApiKey) -> bytes | None:
        try:
            sent = decode_request(body)
        except (msgspec.ValidationError, *UNDECODABLE):
            return None
        return await _score(scorer, sent)

    return answer


async def _score(scorer: Scorer, sent: ScoreRequest) -> bytes:
    """Check the ids, decide, and encode the `ScoreAnswer`. Raises `InvalidInput` and the errors of `Scorer.score`."""
    check_ids([sent.user_id], "user_id")
    if sent.request_id is not None:
        check_ids([sent.request_id], "request_id")
    ids = [candidate.id for candidate in sent.candidates]
    check_ids(ids, "candidates[{}].id")
    if len(set(ids)) != len(ids):
        raise InvalidInput("several candidates have the same id", _repeated(ids))
    given = sent.profile_features
    request = ScoringRequest(
        user_id=sent.user_id,
        candidates=tuple(sent.candidates),
        context=sent.context or Context(),
        origin="service" if given is UNSET else "absent" if given is None else "request",
        profile=msgspec.to_builtins(given) if given else None,
        explore=sent.explore,
        request_id=sent.request_id,
    )
    decision = await scorer.score(request)
    return _encode(
        ScoreAnswer(
            decision.id,
            decision.chosen_id,
            # Stable: ties keep the order of the request.
            sorted(_ranked(decision, decision.ranking), key=lambda item: -item.score),
            ServingPolicy(decision.served_by, decision.policy_hash, decision.state_version),
            ProfileOrigin(decision.origin),
        )
    )


@get(
    "/decisions/{decision_id:str}",
    opt={"scope": "read"},
    tags=["Tips"],
    summary="Explain a decision",
    description="Returns the request, what each input contributed to each score, the probability of each candidate, "
    "the scores of the other policy, and the outcome.",
)
async def get_decision(request: HttpRequest, decision_id: DecisionId) -> DecisionAnswer:
    decision, outcome = await request.service.bandit.scorer.explain(decision_id)
    return explanation(decision, outcome)


def _ranked(decision: Decision, ranking: Ranking) -> list[RankedCandidate]:
    ids = (candidate.id for candidate in decision.candidates)
    return list(map(RankedCandidate, ids, ranking.scores.tolist(), ranking.pi.tolist()))


def explanation(decision: Decision, outcome: DecisionOutcome) -> DecisionAnswer:
    read, events = decision.profile_read, outcome.events
    given: Any = decision.profile
    read_at, versions = (rfc3339(read.at_ms), read.versions) if read is not None else (None, None)
    ranking, contributions = _ranked(decision, decision.ranking), decision.contributions() or repeat(None)
    return view(
        DecisionAnswer,
        decision,
        decision_id=decision.id,
        decided_at=rfc3339(decision.created_at_ms),
        policy=view(DecidingPolicy, decision, id=decision.served_by, spec_hash=decision.policy_hash),
        profile=DecisionProfile(decision.origin, given, read_at, versions),
        context=DecisionContext.of(decision.context),
        candidates=[
            view(ExplainedCandidate, ranked, features=view(CandidateFeatures, item.features), contributions=parts)
            for item, ranked, parts in zip(decision.candidates, ranking, contributions, strict=False)
        ],
        shadow=decision.shadow and ShadowRanking(OTHER[decision.role], _ranked(decision, decision.shadow)),
        outcome=view(
            DecisionOutcomeView,
            outcome,
            late=events.get("late", 0),
            repeated=events.get("repeated", 0),
            other_tip=events.get("other tip", 0),
        ),
    )


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
            found = issue_of(error)
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
