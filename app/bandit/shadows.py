"""What a shadow is made of, and the making: pure arithmetic, for many decisions at once.

Invariant: a shadow is worked out from the very snapshot that its decision was made of, so it does not matter when, or
in which process. Knows nothing of loops, storage or metrics: `app.aside` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from app.bandit.decisions import Ranking, Role, Shadow
from app.bandit.evidence import Evidence
from app.bandit.lineup import Lineup
from app.bandit.ranking import best, ranking_of
from app.bandit.terms import Array
from app.bandit.together import Case, decide_together

SCORED_AT_ONCE = 8  # what is worked on then stays in a core's cache


class Unshadowed(NamedTuple):
    """A decision whose shadow is to be worked out, and the snapshot it was made of.

    `own` is the ranking by the policy that served, `mu` the pooled prior's mean, `phi` the vectors of all candidates
    (K, D). `elapsed_us`: how long the answer took, its commit included.
    """

    decision_id: str
    role: Role
    explore: bool
    chosen: int
    elapsed_us: int
    own: Ranking
    evidence: Evidence
    mu: Array
    phi: Array


def shadows_of(group: Sequence[Unshadowed], lineup: Lineup) -> list[Shadow]:
    """Both rankings of each, and the terms of a doubly robust estimate; in no order.

    The reward model is the pooled prior that the decision names: q(φ) = φᵀμ, within [0, 1]. It was made of rewards
    known before the decision.
    """
    alike: dict[tuple[Role, int], list[Unshadowed]] = {}
    for item in group:
        alike.setdefault((item.role, len(item.phi)), []).append(item)
    shadows: list[Shadow] = []
    for (role, _), items in alike.items():
        policy = lineup.policy("challenger" if role == "champion" else "champion")
        for start in range(0, len(items), SCORED_AT_ONCE):
            part = items[start : start + SCORED_AT_ONCE]
            cases = [Case(item.decision_id, item.evidence, item.mu, item.phi) for item in part]
            for item, scored in zip(part, decide_together(policy, cases), strict=True):
                shadows.append(_shadow(item, ranking_of(scored, item.explore)))
    return shadows


def _shadow(item: Unshadowed, other: Ranking) -> Shadow:
    champion, challenger = (item.own, other) if item.role == "champion" else (other, item.own)
    q = np.clip(item.phi @ item.mu, 0.0, 1.0)
    return Shadow(
        decision_id=item.decision_id,
        champion=champion,
        challenger=challenger,
        chosen=item.chosen,
        agree=best(champion.scores) == best(challenger.scores),
        q_logged=float(q[item.chosen]),
        v_champion=float(champion.pi @ q),
        v_challenger=float(challenger.pi @ q),
        elapsed_us=item.elapsed_us,
    )
