"""Computes decisions again: the shadow of a decision is the ranking by the policy that did not serve.

Invariant: a shadow is computed from what its decision was made from, all of which is stored: the request, the profile,
the pooled prior with the decision's `prior_version`, and the user's statistics as of its `state_version`. The random
numbers derive from the decision's id. So the result does not depend on when or in which process it is computed.
"""

from __future__ import annotations

from app.bandit.decisions import Decision, Shadow
from app.bandit.model.inputs import Array, packed
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import POOLED_CHAMPION, Policies, best
from app.bandit.numpy_on_demand import np


def shadow_of(decision: Decision, statistics: SufficientStatistics | None, mu: Array, policies: Policies) -> Shadow:
    """Compute both policies' rankings of a decision, and the terms of the doubly robust estimate.

    `statistics` are those that the decision was made from, None for a user without any. `mu` (D,) is the mean of the
    decision's pooled prior. The reward model is this prior, q(φ) = φᵀμ clipped to [0, 1]. It was fitted to rewards
    known before the decision.

    Raises:
        SpecMismatch: the statistics or `mu` belong to another spec than the policies.
    """
    grown = policies.grown(statistics)
    phi = decision.phi_under(policies.longest)
    other = policies.policy("challenger" if decision.role == "champion" else "champion")
    own, (shadow, _) = decision.ranking, other.decide(decision.id, grown, mu, phi, decision.explore)
    champion, challenger = (own, shadow) if decision.role == "champion" else (shadow, own)
    pool_mu = mu[: POOLED_CHAMPION.spec.size]
    pool, _ = POOLED_CHAMPION.decide(decision.id, grown, pool_mu, phi, decision.explore)
    q = np.clip(phi @ mu, 0.0, 1.0)
    return Shadow(
        champion_scores=packed(champion.scores),
        champion_pi=packed(champion.pi),
        challenger_scores=packed(challenger.scores),
        challenger_pi=packed(challenger.pi),
        champion_p=float(champion.pi[decision.chosen]),
        challenger_p=float(challenger.pi[decision.chosen]),
        agree=int(best(champion.scores) == best(challenger.scores)),
        q_logged=float(q[decision.chosen]),
        v_champion=float(champion.pi @ q),
        v_challenger=float(challenger.pi @ q),
        pool_p=float(pool.pi[decision.chosen]),
        v_pool=float(pool.pi @ q),
    )
