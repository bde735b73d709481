"""Computes shadows, the rankings by the policy that did not serve, for many decisions at once.

Invariant: a shadow is computed from the same snapshot as its decision. So the result does not depend on when or in
which process it is computed; `app.bandit.shadow.subprocess` runs this module in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.bandit.decisions import Ranking, Role, Shadow
from app.bandit.model.inputs import Array, Factors, packed
from app.bandit.model.policies import Policies
from app.bandit.model.specs import SPECS
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import ScoringCase, answered_ranking, best
from app.bandit.numpy_on_demand import np

SCORED_AT_ONCE = 8  # so that the arrays fit into the cache of a core


class Unshadowed(NamedTuple):
    """A stored decision whose shadow has not been computed, with the data that the decision was made from.

    `role` and `own` are the role and the ranking of the policy that served. `chosen` is the index of the chosen
    candidate, `mu` the mean of the pooled prior, and `factors` are the factors of the request. `elapsed_us` is the
    duration of the scoring request, including the commit.
    """

    decision_id: str
    role: Role
    explore: bool
    chosen: int
    elapsed_us: int
    own: Ranking
    statistics: SufficientStatistics
    mu: Array
    factors: Factors


def shadows_of(group: Sequence[Unshadowed], policies: Policies) -> list[Shadow]:
    """Compute the shadow of each decision: the rankings by champion and challenger, and the terms of the doubly robust
    estimate. The results may come in any order.

    The reward model is the pooled prior of the decision, q(φ) = φᵀμ clipped to [0, 1]. It was fitted to rewards known
    before the decision.
    """
    alike: dict[tuple[Role, int], list[tuple[Unshadowed, Array]]] = {}
    for item in group:
        phi = SPECS[item.statistics.spec_hash].phi_from(*item.factors)
        alike.setdefault((item.role, len(phi)), []).append((item, phi))
    shadows: list[Shadow] = []
    for (role, _), items in alike.items():
        policy = policies.policy("challenger" if role == "champion" else "champion")
        for start in range(0, len(items), SCORED_AT_ONCE):
            part = items[start : start + SCORED_AT_ONCE]
            cases = [ScoringCase(item.decision_id, item.statistics, item.mu, phi) for item, phi in part]
            for (item, phi), scored in zip(part, policy.decide_batch(cases), strict=True):
                shadows.append(_shadow(item, phi, answered_ranking(*scored, item.explore)))
    return shadows


def _shadow(item: Unshadowed, phi: Array, other: Ranking) -> Shadow:
    champion, challenger = (item.own, other) if item.role == "champion" else (other, item.own)
    q = np.clip(phi @ item.mu, 0.0, 1.0)
    return Shadow(
        decision_id=item.decision_id,
        champion_scores=packed(champion.scores),
        champion_pi=packed(champion.pi),
        challenger_scores=packed(challenger.scores),
        challenger_pi=packed(challenger.pi),
        champion_p=float(champion.pi[item.chosen]),
        challenger_p=float(challenger.pi[item.chosen]),
        agree=best(champion.scores) == best(challenger.scores),
        q_logged=float(q[item.chosen]),
        v_champion=float(champion.pi @ q),
        v_challenger=float(challenger.pi @ q),
        elapsed_us=item.elapsed_us,
    )
