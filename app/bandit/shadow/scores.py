"""What a shadow is made of, and the making: pure arithmetic, for many decisions at once.

Invariant: a shadow is worked out from the very snapshot that its decision was made of, so it does not matter when, or
in which process. `app.bandit.shadow.subprocess` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from app.bandit.decisions import Ranking, Role, Shadow
from app.bandit.model.inputs import Array, Inputs, packed
from app.bandit.model.joint import Case, decide_together
from app.bandit.model.policies import Policies
from app.bandit.model.ranking import best, ranking_of
from app.bandit.model.specs import SPECS
from app.bandit.model.sufficient_statistics import SufficientStatistics

SCORED_AT_ONCE = 8  # what is worked on then stays in a core's cache


class Unshadowed(NamedTuple):
    """A decision whose shadow is to be worked out, and the snapshot it was made of.

    `own` is the ranking by the policy that served, `mu` the pooled prior's mean, `terms` what the vectors of
    the evidence's spec are made of. `elapsed_us`: how long the answer took, its commit included.
    """

    decision_id: str
    role: Role
    explore: bool
    chosen: int
    elapsed_us: int
    own: Ranking
    evidence: SufficientStatistics
    mu: Array
    terms: Inputs


def shadows_of(group: Sequence[Unshadowed], lineup: Policies) -> list[Shadow]:
    """Both rankings of each, and the terms of a doubly robust estimate; in no order.

    The reward model is the pooled prior that the decision names: q(φ) = φᵀμ, within [0, 1]. It was made of rewards
    known before the decision.
    """
    alike: dict[tuple[Role, int], list[tuple[Unshadowed, Array]]] = {}
    for item in group:
        phi = SPECS[item.evidence.spec_hash].joined(*item.terms)
        alike.setdefault((item.role, len(phi)), []).append((item, phi))
    shadows: list[Shadow] = []
    for (role, _), items in alike.items():
        policy = lineup.policy("challenger" if role == "champion" else "champion")
        for start in range(0, len(items), SCORED_AT_ONCE):
            part = items[start : start + SCORED_AT_ONCE]
            cases = [Case(item.decision_id, item.evidence, item.mu, phi) for item, phi in part]
            for (item, phi), scored in zip(part, decide_together(policy, cases), strict=True):
                shadows.append(_shadow(item, phi, ranking_of(*scored, item.explore)))
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
