"""Scoring requests, decisions, their outcomes, and their shadows: the rankings by the policy that did not serve.

A stored decision holds everything that its answer contains. So a repeated request gets the same answer, whatever has
been learned since. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, NewType

import msgspec
from msgspec import Meta
from msgspec.structs import asdict

from app.bandit.model.inputs import SPECS, Array, Candidate, Context, ContextFeatures, Profile, Spec, packed
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.model.thompson_sampling import OTHER, POOLED_CHAMPION, Policies, Ranking, Role, best
from app.bandit.numpy_on_demand import np
from app.features.clock import rfc3339
from app.features.events import Action
from app.features.registry import ProfileRead
from app.features.views import view

Origin = Literal["request", "service", "absent"]
DecisionState = Literal["open", "served", "learned", "expired"]
RewardSource = Literal["feedback", "default"]
EventOutcome = Literal["served", "learned", "repeated", "late", "other tip"]
Vector = list[float] | None
Time = NewType("Time", str)  # RFC 3339 in UTC
MAX_CANDIDATES = 100


class ScoringRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to rank candidates and choose one of them. `origin` is "service" if the service reads the user's
    profile, "request" if the request contains the profile, and "absent" if the decision is made without one. If
    `explore` is true, the choice is sampled from the policy's propensities. Otherwise the highest score wins. A
    repeated request with the same `request_id` gets the same decision."""

    user_id: str
    candidates: tuple[Candidate, ...]
    context: Context
    origin: Origin = "service"
    profile: Profile = None
    explore: bool = True
    request_id: str | None = None


class UserSnapshot(NamedTuple):
    """The data from the database that a decision about one user needs. `erasures` is the number of users erased so far.
    It is read first, so the other fields may be newer. `share`, 0 to 1, is the share of users that the challenger
    serves, and `salt` decides which users these are. `version` is a pair: the spec hash of the user's statistics, and
    the number of decisions in them. `statistics` is None if no decision about the user has been learned, or if they are
    damaged. `stored` is the earlier decision with the same request id."""

    erasures: int
    prior: Prior
    share: float
    salt: str
    version: tuple[str, int] | None
    statistics: SufficientStatistics | None
    stored: Decision | None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of one candidate for one user, as stored.

    `role` is the role of the policy that chose, `policy_hash` the hash of its spec, and `theta` (D,) the posterior mean
    θ̂ of its weights. `chosen` is the index of the chosen candidate, and `phi` (D',) its input vector under the spec
    with the hash `spec_hash`, which may have more inputs than the policy's spec. `state_version` is the number of the
    user's decisions that were learned before this one. `profile` holds the profile features that the policy used.
    `profile_read` tells how the service read them. It is None if the service did not read them, and for decisions from
    before database revision 0007. `shadow` is the ranking by the other policy, None until a worker has computed it.
    `elapsed_us` is the time that the decision took, without the commit that stores it.
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
    candidates: tuple[Candidate, ...]
    context: Context
    chosen: int
    elapsed_us: int
    theta: Array
    phi: Array
    ranking: Ranking
    shadow: Ranking | None

    @property
    def chosen_id(self) -> str:
        return self.candidates[self.chosen].id

    def phi_under(self, spec: Spec) -> Array:
        """The input vectors φ (K, D) of the candidates under a spec, which may be newer than the decision."""
        return spec.phi(self.candidates, self.context, self.profile)

    def vector(self, spec: Spec) -> Array:
        """The chosen candidate's logged φ, extended to `spec` by inputs that are computed from the request."""
        if len(self.phi) >= spec.size:
            return self.phi
        return np.concatenate([self.phi, self.phi_under(spec)[self.chosen, len(self.phi) :]])

    def contributions(self) -> list[dict[str, float]] | None:
        """For each candidate, the parts θ̂ᵢφᵢ of its score by input. None if this release does not know the spec."""
        spec = SPECS.get(self.policy_hash)
        if spec is None:
            return None
        products = self.phi_under(spec) * self.theta
        return [dict(zip(spec.names, row, strict=True)) for row in (products + 0.0).tolist()]  # + 0.0: no "-0.0"


class DecisionOutcome(NamedTuple):
    """The state of a decision, and the number of events about it by outcome. `reward` and `source` (feedback of the
    user, or the default reward) are None until the decision is learned. `settled_at_ms` is None until it is learned or
    expires."""

    state: DecisionState
    served_at_ms: int | None
    reward: float | None
    source: RewardSource | None
    action: Action | None
    settled_at_ms: int | None
    events: Mapping[EventOutcome, int]


def shadow_of(
    decision: Decision, statistics: SufficientStatistics | None, mu: Array, policies: Policies
) -> dict[str, object]:
    """Compute the ranking by the policy that did not serve, and the terms of the doubly robust estimate, as columns.

    `statistics` are the user's statistics from which the decision was made; None for a user without statistics. `mu`
    (D,) is the mean of the decision's pooled prior. The other inputs are stored with the decision, and its id
    determines the random numbers, so the result does not depend on when or in which process it is computed.

    In column names, `…` is `champion` or `challenger`. `…_scores` and `…_pi` hold the scores and the propensities π of
    all candidates as little-endian float64. `…_p` is π(chosen). The reward model is the prior, q(φ) = φᵀμ clipped to
    [0, 1], which was fitted to rewards known before the decision. `q_logged` is q(chosen), and `v_…` is Σₐ π(a) q(a).
    `agree` is 1 if both policies rank the same candidate first, else 0. `pool_p` and `v_pool` belong to a third policy,
    `POOLED_CHAMPION`.
    """
    grown, phi = policies.grown(statistics), decision.phi_under(policies.longest)
    other = OTHER[decision.role]
    shadow, _ = policies.policy(other).decide(decision.id, grown, mu, phi, decision.explore)
    pool, _ = POOLED_CHAMPION.decide(decision.id, grown, mu, phi, decision.explore)
    q = np.clip(phi @ mu, 0.0, 1.0)
    rankings: dict[str, Ranking] = {decision.role: decision.ranking, other: shadow}
    evaluated = {**rankings, "pool": pool}
    return {
        **{f"{role}_scores": packed(ranking.scores) for role, ranking in rankings.items()},
        **{f"{role}_pi": packed(ranking.pi) for role, ranking in rankings.items()},
        **{f"{name}_p": float(ranking.pi[decision.chosen]) for name, ranking in evaluated.items()},
        **{f"v_{name}": float(ranking.pi @ q) for name, ranking in evaluated.items()},
        "agree": int(best(decision.ranking.scores) == best(shadow.scores)),
        "q_logged": float(q[decision.chosen]),
    }


class DecisionLine(msgspec.Struct):
    """A decision in a list. `probability` is the chosen candidate's propensity; null if the stored one is damaged."""

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
        Meta(description="For each value that the service read, the number of the newest event that it reflects."),
    ]
    profile_read_at: Time | None
    context: DecisionContext
    candidates: Sequence[Candidate]
    phi: Annotated[list[list[float]] | None, Meta(description="The input vectors; null if of another release.")]
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
        rankings = {decision.role: decision.ranking, OTHER[decision.role]: decision.shadow}
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
            **{f"{role}_scores": ranking and ranking.scores.tolist() for role, ranking in rankings.items()},
            **{f"{role}_pi": ranking and ranking.pi.tolist() for role, ranking in rankings.items()},
            reward_source=outcome.source,
        )
