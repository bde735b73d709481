"""A ranking: from what a policy makes of the candidates to the one that is shown.

Invariant: the candidate that a greedy choice takes is the first of the ranking as it is answered, by scores, and of
those that tie, in the order sent.
"""

from __future__ import annotations

import numpy as np

from app.bandit.decisions import Ranking
from app.bandit.model.inputs import Array
from app.bandit.model.policy import sample

# Scores that differ by rounding alone are equal: that depends on a candidate's place.
DIGITS = 12


def ranking_of(means: Array, pi: Array, explore: bool) -> Ranking:
    """Scores, and the probability of each candidate: π, or all for the best."""
    scores = np.round(means, DIGITS)
    return Ranking(scores, pi if explore else np.eye(len(scores))[best(scores)])


def best(scores: Array) -> int:
    """The index of the best, the first of those that tie."""
    return int(np.argmax(scores))


def chosen(ranking: Ranking, decision_id: str, explore: bool) -> int:
    """The index of the candidate to show."""
    return sample(ranking.pi, decision_id) if explore else best(ranking.scores)
