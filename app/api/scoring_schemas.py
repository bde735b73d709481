"""Bodies of the routes that rank tips and explain decisions."""

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
    """What is known of a candidate tip."""

    is_overdue: bool
    task_age_days: Annotated[float, Meta(ge=0, examples=[3.5])]
    priority: Annotated[float, Meta(description="Higher matters more; any scale.", examples=[2])]


class ScoreCandidate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tip that could be shown."""

    id: Id
    features: CandidateFeatures


class ScoreContext(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When the tip would be shown."""

    at: Moment | None = None


class ScoreRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Candidates to rank for a user."""

    user_id: Annotated[Id, Meta(examples=["ada"])]
    candidates: Annotated[
        list[ScoreCandidate],
        Meta(
            min_length=1,
            max_length=MAX_CANDIDATES,
            description="Their ids are unique.",
            examples=[CANDIDATES_EXAMPLE],
        ),
    ]
    request_id: Annotated[
        Id | None, Meta(description="Again with the same id: the stored decision, whatever else is sent.")
    ] = None
    context: ScoreContext | None = None
    profile_features: Annotated[
        ProfileFeatures | UnsetType | None,
        Meta(
            description="Who the user is. Not given: the service reads the profile. Null: nothing is known.",
            examples=[PROFILE_EXAMPLE],
        ),
    ] = UNSET
    explore: Annotated[
        bool, Meta(description="False: the best by what is known, nothing left to chance; no part of any evaluation.")
    ] = True


class Ranked(msgspec.Struct):
    """A candidate, its expected reward, and the probability with which it was chosen."""

    id: str
    score: float
    probability: Probability


class ServingPolicy(msgspec.Struct):
    """Who decided. `state_version`: from how many of the user's decisions it had learned."""

    id: str
    spec_hash: str
    state_version: int


class ProfileOrigin(msgspec.Struct):
    """Where the profile came from."""

    origin: Literal["request", "service", "absent"]


class ScoreAnswer(msgspec.Struct):
    """A decision: the ranking is by score, and the chosen one need not be its first."""

    decision_id: str
    chosen_id: str
    ranking: list[Ranked]
    policy: ServingPolicy
    profile: ProfileOrigin


class DecidingPolicy(msgspec.Struct):
    """Who decided. `prior_version`: the pooled prior in force then; 0 before the first."""

    id: str
    role: Literal["champion", "challenger"]
    spec_hash: str
    state_version: int
    prior_version: int


class UsedProfile(msgspec.Struct):
    """Where the profile came from, and what was in it."""

    origin: Literal["request", "service", "absent"]
    features: dict[str, Value] | None


class UsedContext(msgspec.Struct):
    """As it was sent."""

    at: str | None


class Explained(msgspec.Struct):
    """A candidate as it was sent, and what each input of the policy added to its score."""

    id: str
    features: CandidateFeatures
    score: float
    probability: Probability
    contributions: Annotated[
        dict[str, float] | None, Meta(description="They sum to the score. Null where the spec is of another release.")
    ]


class ShadowShown(msgspec.Struct):
    """What the policy that did not serve made of the same candidates, in the order sent."""

    role: Literal["champion", "challenger"]
    candidates: list[Ranked]


class OutcomeShown(msgspec.Struct):
    """What came of it. `late`, `repeated`, `other_tip`: events that were counted, and not learned."""

    state: Annotated[
        Literal["open", "served", "learned", "expired"],
        Meta(description="`open`: not served yet; `served`: feedback is awaited; `expired`: never served."),
    ]
    served_at: str | None
    reward: float | None
    source: Annotated[Literal["feedback", "default"] | None, Meta(description="`default`: no feedback came in time.")]
    action: Action | None
    settled_at: str | None
    late: int
    repeated: int
    other_tip: int


class DecisionAnswer(msgspec.Struct):
    """Everything that explains a decision."""

    decision_id: str
    decided_at: str
    user_id: str
    request_id: str | None
    explore: bool
    chosen_id: str
    policy: DecidingPolicy
    profile: UsedProfile
    context: UsedContext
    candidates: Annotated[list[Explained], Meta(description="In the order sent.")]
    shadow: Annotated[ShadowShown | None, Meta(description="Null until it is known.")]
    outcome: OutcomeShown
