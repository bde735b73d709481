"""Bodies of the routes that rank candidate tips and explain decisions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.api.schemas import Moment, Value
from app.bandit.decisions import MAX_CANDIDATES
from app.features.events import Action
from app.features.ids import Id
from app.features.schema import ProfileFeatures

Probability = Annotated[float, Meta(ge=0, le=1)]
CANDIDATES_EXAMPLE = [
    {"id": "t-1", "features": {"is_overdue": True, "task_age_days": 3.5, "priority": 2}},
    {"id": "t-2", "features": {"is_overdue": False, "task_age_days": 12, "priority": 1}},
]
PROFILE_EXAMPLE = {"completion_rate_30d": 0.7, "preferred_hour": 9, "tip_volume_30d": 24}


class CandidateFeatures(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The features of a candidate, from which the policy computes its score."""

    is_overdue: bool
    task_age_days: Annotated[float, Meta(ge=0, examples=[3.5])]
    priority: Annotated[float, Meta(description="Higher matters more; any scale.", examples=[2])]


class ScoreCandidate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tip that may be shown, with its features."""

    id: Id
    features: CandidateFeatures


class ScoreContext(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The circumstances of the decision. `at`: when the tip is shown, with the user's UTC offset."""

    at: Moment | None = None


class ScoreRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rank candidate tips for a user."""

    user_id: Annotated[Id, Meta(examples=["ada"])]
    candidates: Annotated[
        list[ScoreCandidate],
        Meta(
            min_length=1,
            max_length=MAX_CANDIDATES,
            description="The ids must be unique.",
            examples=[CANDIDATES_EXAMPLE],
        ),
    ]
    request_id: Annotated[
        Id | None,
        Meta(description="Idempotency key: repeating it for the same user returns the stored decision."),
    ] = None
    context: ScoreContext | None = None
    profile_features: Annotated[
        ProfileFeatures | UnsetType | None,
        Meta(
            description="The user's profile. Not given: the service reads it. Null: score without a profile.",
            examples=[PROFILE_EXAMPLE],
        ),
    ] = UNSET
    explore: Annotated[
        bool,
        Meta(description="False: choose the candidate with the highest mean score; excluded from policy evaluation."),
    ] = True


class Ranked(msgspec.Struct):
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

    origin: Literal["request", "service", "absent"]


class ScoreAnswer(msgspec.Struct):
    """A decision. The ranking is by score; the chosen candidate is not always the first."""

    decision_id: str
    chosen_id: str
    ranking: list[Ranked]
    policy: ServingPolicy
    profile: ProfileOrigin


class DecidingPolicy(msgspec.Struct):
    """The policy that decided. `state_version`: how many decisions of the user it had learned from.
    `prior_version`: the version of the prior, which is pooled over all users; 0 if no prior existed."""

    id: str
    role: Literal["champion", "challenger"]
    spec_hash: str
    state_version: int
    prior_version: int


class UsedProfile(msgspec.Struct):
    """The profile that the policy used: sent with the request, read by the service, or absent."""

    origin: Literal["request", "service", "absent"]
    features: dict[str, Value] | None
    read_at: Annotated[
        str | None, Meta(description="The moment at which all values were true; null unless the service read them.")
    ]
    versions: Annotated[
        dict[str, int] | None,
        Meta(description="For each value, the number of the user's newest event that it reflects; 0 if none."),
    ]


class UsedContext(msgspec.Struct):
    """The context of the scoring request. `at`: when the tip is shown."""

    at: str | None


class Explained(msgspec.Struct):
    """A candidate of the request, and the contribution of each input of the policy to its score."""

    id: str
    features: CandidateFeatures
    score: float
    probability: Probability
    contributions: Annotated[
        dict[str, float] | None, Meta(description="They sum to the score. Null if a release with other inputs decided.")
    ]


class ShadowShown(msgspec.Struct):
    """The candidates with the scores of the policy that did not serve, in the order of the request."""

    role: Literal["champion", "challenger"]
    candidates: list[Ranked]


class OutcomeShown(msgspec.Struct):
    """What happened after the decision. `late`, `repeated` and `other_tip` count the events that the policy ignored."""

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
    profile: UsedProfile
    context: UsedContext
    candidates: Annotated[list[Explained], Meta(description="In the order of the request.")]
    shadow: Annotated[ShadowShown | None, Meta(description="Null until it is computed.")]
    outcome: OutcomeShown
