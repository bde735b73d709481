"""Scoring requests, decisions and their outcomes.

A stored decision holds everything that its answer contains. So a repeated request gets the same answer, whatever has
been learned since. Arrays are float64. This module imports neither storage nor HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, NewType

import msgspec
from msgspec import Meta
from msgspec.structs import asdict

from app.bandit.model.inputs import SPECS, Array, Candidate, Context, ContextFeatures, Profile, Spec
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.numpy_on_demand import np
from app.features.clock import rfc3339
from app.features.events import Action
from app.features.registry import ProfileRead
from app.features.views import view

Origin = Literal["request", "service", "absent"]
Role = Literal["champion", "challenger"]
DecisionState = Literal["open", "served", "learned", "expired"]
RewardSource = Literal["feedback", "default"]
EventOutcome = Literal["served", "learned", "repeated", "late", "other tip"]
Vector = list[float] | None
Time = NewType("Time", str)  # RFC 3339 in UTC
MAX_CANDIDATES = 100


class ScoringRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to rank candidates and choose one. `origin` is "service" if the scorer reads the user's profile,
    "request" if `profile` came with the request, and "absent" if neither. With `explore`, the choice is sampled from
    the policy's propensities; without it, the highest score wins. A repeated request with the same `request_id` gets
    the same decision."""

    user_id: str
    candidates: tuple[Candidate, ...]
    context: Context
    origin: Origin = "service"
    profile: Profile = None
    explore: bool = True
    request_id: str | None = None


class UserSnapshot(NamedTuple):
    """All that a decision about one user needs from the database.

    `erasures` counts the users erased so far. It is read first, so the other fields may be newer. The challenger, the
    policy on trial, serves the `share` of the users, 0 to 1; `salt` decides which ones. `version` is the spec hash of
    the user's statistics, and their number of decisions. `statistics` is None if no decision about the user has been
    learned. `stored` is the earlier decision with the same request id; None if there is none.
    """

    erasures: int
    prior: Prior
    share: float
    salt: str
    version: tuple[str, int] | None
    statistics: SufficientStatistics | None
    stored: Decision | None


class Ranking(NamedTuple):
    """One policy's result for K candidates. `scores` (K,) are the posterior means of the candidates' rewards. `pi` (K,)
    are their propensities: the probabilities with which the policy chooses them."""

    scores: Array
    pi: Array


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of one candidate for one user, as stored.

    `role` is the role of the policy that chose: the champion, or the challenger, which is on trial. `policy_hash` is
    the hash of that policy's spec (its list of model inputs), and `theta` (D,) the posterior mean θ̂ of its weights.
    `chosen` is the index of the chosen candidate, and `phi` (D',) its input vector. `spec_hash` is the hash of the spec
    of `phi`, which may have more inputs than the policy's spec. `state_version` is the number of the user's decisions
    that were learned before this one. `profile` holds the profile features that the policy used. `profile_read` tells
    how the service read them. It is None if they were not read by the service, and for decisions from before database
    revision 0007. `champion` and `challenger` are the rankings by the two policies; the one by the policy that did not
    choose is None until a worker has computed it. `elapsed_us` is the time that the decision took, without the commit
    that stores it.
    """

    id: str
    request_id: str | None
    user_id: str
    created_at_ms: int
    explore: bool
    role: Role
    served_by: str
    policy_hash: str
    spec_hash: str
    state_version: int
    prior_version: int
    origin: Origin
    profile: Profile
    profile_read: ProfileRead | None
    profile_present: bool
    candidates: tuple[Candidate, ...]
    context: Context
    chosen: int
    elapsed_us: int
    theta: Array
    phi: Array
    champion: Ranking | None
    challenger: Ranking | None

    @property
    def ranking(self) -> Ranking:
        """The ranking by the policy that chose the candidate."""
        served = self.champion if self.role == "champion" else self.challenger
        assert served is not None  # a decision is stored with the serving policy's ranking
        return served

    @property
    def chosen_id(self) -> str:
        return self.candidates[self.chosen].id

    def phi_under(self, spec: Spec) -> Array:
        """The input vectors φ (K, D) of the candidates under a spec, which may be newer than the decision."""
        return spec.phi(self.candidates, self.context, self.profile)

    def vector(self, spec: Spec) -> Array:
        """The logged φ of the chosen candidate, followed by the additional inputs of `spec`, computed from the
        request."""
        if len(self.phi) >= spec.size:
            return self.phi
        return np.concatenate([self.phi, self.phi_under(spec)[self.chosen, len(self.phi) :]])

    def contributions(self) -> list[dict[str, float]] | None:
        """For each candidate, in the order of the request, the part of its score that each input contributes, by name.

        Input i contributes θ̂ᵢφᵢ, so the parts sum to the score. None if this release does not know the policy's spec
        (its list of inputs), because another release made the decision.
        """
        spec = SPECS.get(self.policy_hash)
        if spec is None:
            return None
        products = self.phi_under(spec) * self.theta
        return [dict(zip(spec.names, row, strict=True)) for row in (products + 0.0).tolist()]  # + 0.0: no "-0.0"


class DecisionOutcome(NamedTuple):
    """The state of a decision, and the number of events about it by outcome. `reward` and `source` are None until the
    decision is learned, `settled_at_ms` is None until it is learned or expires."""

    state: DecisionState
    served_at_ms: int | None
    reward: float | None
    source: RewardSource | None
    action: Action | None
    settled_at_ms: int | None
    events: Mapping[EventOutcome, int]


class Shadow(NamedTuple):
    """Both policies' rankings of a decision, and the terms of the doubly robust estimate, as columns of the decision.

    `*_scores` and `*_pi` hold the scores and the propensities π of all candidates as little-endian float64. `*_p` is
    π(chosen). With q(a) the reward that the decision's pooled prior predicts for candidate a, `q_logged` is q(chosen),
    and `v_*` is Σₐ π(a) q(a). `agree` is 1 if both policies rank the same candidate first, else 0. `pool_p` and
    `v_pool` are π(chosen) and v of a third policy, which never serves: the champion's spec with the pooled prior. It
    separates the effect of the pooled prior from the effect of the profile features.
    """

    champion_scores: bytes
    champion_pi: bytes
    challenger_scores: bytes
    challenger_pi: bytes
    champion_p: float
    challenger_p: float
    agree: int
    q_logged: float
    v_champion: float
    v_challenger: float
    pool_p: float
    v_pool: float


class DecisionLine(msgspec.Struct):
    """A decision in a list. `probability`: that of the chosen candidate; null if the stored ones are damaged."""

    decision_id: str
    decided_at: str
    user_id: str
    chosen_id: str
    probability: float | None
    role: Role
    served_by: Annotated[str, Meta(description="The policy that decided.")]
    state: DecisionState
    reward: float | None
    action: Action | None


class DecisionContext(ContextFeatures, frozen=True, kw_only=True, omit_defaults=False):
    """The context of the scoring request. `at`: when the tip is shown, with the user's UTC offset."""

    at: str | None

    @classmethod
    def of(cls, context: Context) -> DecisionContext:
        return cls(**asdict(context) | {"at": context.at and context.at.isoformat()})


class DecisionRecord(msgspec.Struct, frozen=True):
    """A stored decision with all that it was made from, and its outcome, as `profiles decisions export` and
    `GET /decisions` show it. Lists are in the order of `candidates`."""

    decision_id: str
    decided_at: Time
    user_id: str
    request_id: str | None
    explore: Annotated[bool, Meta(description="False: the first of the ranking was chosen, whatever its propensity.")]
    role: Role
    served_by: str
    policy_hash: str
    spec_hash: Annotated[str, Meta(description="The hash of the list of inputs in `phi`.")]
    state_version: Annotated[int, Meta(description="How many of the user's decisions had been learned.")]
    prior_version: int
    profile_origin: Origin
    profile: Mapping[str, float | int | str | None] | None
    profile_versions: Annotated[
        dict[str, int] | None,
        Meta(
            description="For each value, the number of the user's newest event that it reflects. Null unless the "
            "service read the profile."
        ),
    ]
    profile_read_at: Time | None
    context: DecisionContext
    candidates: Sequence[Candidate]
    phi: Annotated[
        list[list[float]] | None, Meta(description="The input vectors. Null if they belong to another release.")
    ]
    champion_scores: Vector
    champion_pi: Annotated[Vector, Meta(description="Propensities of the champion; null until they are computed.")]
    challenger_scores: Vector
    challenger_pi: Vector
    chosen: Annotated[int, Meta(description="The index of the chosen candidate.")]
    chosen_id: str
    state: DecisionState
    served_at: Time | None
    reward: Annotated[float | None, Meta(description="Null until the decision is learned.")]
    reward_source: RewardSource | None
    action: Action | None
    settled_at: Time | None

    @classmethod
    def of(cls, decision: Decision, outcome: DecisionOutcome) -> DecisionRecord:
        read, spec = decision.profile_read, SPECS.get(decision.spec_hash)
        champion, challenger = decision.champion, decision.challenger
        return view(
            cls,
            decision,
            outcome,
            decision_id=decision.id,
            decided_at=rfc3339(decision.created_at_ms),
            profile_origin=decision.origin,
            profile_versions=read and read.versions,
            profile_read_at=read and rfc3339(read.at_ms),
            context=DecisionContext.of(decision.context),
            phi=spec and decision.phi_under(spec).tolist(),
            champion_scores=champion and champion.scores.tolist(),
            champion_pi=champion and champion.pi.tolist(),
            challenger_scores=challenger and challenger.scores.tolist(),
            challenger_pi=challenger and challenger.pi.tolist(),
            reward_source=outcome.source,
        )
