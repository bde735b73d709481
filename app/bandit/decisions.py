"""A decision: what was asked, what was known, what was chosen with which probability, and what came of it.

Invariant: a decision that exists holds all that its answer is made of, so a repeated request gets the same answer,
whatever was learned since. Arrays are float64. Knows nothing of storage or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from app.bandit.model.inputs import Array, Candidate, Context, Profile
from app.bandit.model.pooled_prior import Prior
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.features.events import Action

Origin = Literal["request", "service", "absent"]
Role = Literal["champion", "challenger"]
State = Literal["open", "served", "learned", "expired"]
RewardSource = Literal["feedback", "default"]
EventOutcome = Literal["served", "learned", "repeated", "late", "other tip"]
MAX_CANDIDATES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRequest:
    """A request to rank candidates. `origin` "service": the profile is to be read; else it is `profile`."""

    user_id: str
    candidates: tuple[Candidate, ...]
    context: Context
    origin: Origin = "service"
    profile: Profile = None
    explore: bool = True
    request_id: str | None = None


class Known(NamedTuple):
    """What the database knew of a user at one look. `evidence` is None where nothing was learned.

    `erasures` counts users erased so far, as of no later than the rest; `stored` is the decision of the same request
    id, where there is one; `share` of the users are served by the challenger.
    """

    erasures: int
    prior: Prior
    share: float
    evidence: SufficientStatistics | None
    stored: Decision | None


class Ranking(NamedTuple):
    """What one policy makes of the candidates: posterior means (K,), and the probability of each (K,)."""

    scores: Array
    pi: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision. `theta` are the weights (D,) behind the serving policy's scores, `phi` (D,) is the chosen's vector.

    `policy_hash` names the spec of the policy that served, `spec_hash` that of `phi`, which may go on after it.
    `profile` holds the features used. The ranking of the policy that did not serve is None until it is known.
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
        """What the policy that served made of it."""
        served = self.champion if self.role == "champion" else self.challenger
        assert served is not None  # it was known when the decision was made
        return served

    @property
    def chosen_id(self) -> str:
        """The candidate that was chosen."""
        return self.candidates[self.chosen].id


class DecisionOutcome(NamedTuple):
    """What came of a decision. `events` counts what events it was told of, by what came of them."""

    state: State
    served_at_ms: int | None
    reward: float | None
    source: RewardSource | None
    action: Action | None
    settled_at_ms: int | None
    events: Mapping[EventOutcome, int]


class Shadow(NamedTuple):
    """What the policy that did not serve made of a decision, and what evaluation needs of both, as it is stored.

    Scores and probabilities of all candidates are little-endian float64; `champion_p` and `challenger_p` are the
    probabilities of the chosen one. `q_logged` is the reward expected of it by the pooled prior that the decision
    names, and `v_champion` and `v_challenger` what that prior expects of each policy (the terms of a doubly robust
    estimate). `agree`: both rank the same candidate first. `elapsed_us`: how long the answer took, its commit included.
    """

    decision_id: str
    champion_scores: bytes
    champion_pi: bytes
    challenger_scores: bytes
    challenger_pi: bytes
    champion_p: float
    challenger_p: float
    agree: bool
    q_logged: float
    v_champion: float
    v_challenger: float
    elapsed_us: int
