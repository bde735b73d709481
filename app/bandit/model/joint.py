"""Many decisions of one policy, scored together: what `Policy.decide` makes of each, in a fraction of the time.

Invariant: each result is that of `Policy.decide` but for rounding, whatever it is scored together with. With A = LLᵀ,
one solution L⁻¹[φᵀ, Λμ + y] gives all: the draws' roots L⁻¹φᵀ, and the means (L⁻¹φᵀ)ᵀ L⁻¹(Λμ + y). The weights
themselves are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from app.bandit.decisions import Ranking
from app.bandit.model import random_streams
from app.bandit.model.inputs import Array
from app.bandit.model.policy import DRAWS, SCALE, Policy, propensities
from app.bandit.model.specs import SPEC_V1
from app.bandit.model.sufficient_statistics import SufficientStatistics


class Case(NamedTuple):
    """One decision to be scored, as `Policy.decide` takes it."""

    decision_id: str
    evidence: SufficientStatistics
    mu: Array
    phi: Array


def decide_together(policy: Policy, cases: Sequence[Case]) -> list[Ranking]:
    """Means and π as `Policy.decide` of each, for cases with the same number of candidates.

    The statistics are of specs that the policy reads.
    """
    size = policy.spec.size
    s, y = (np.stack(each) for each in zip(*(case.evidence.leading(size) for case in cases), strict=True))
    phi = np.stack([case.phi[:, :size] for case in cases])
    precisions = policy.spec.precisions
    s[:, np.arange(size), np.arange(size)] += precisions
    if policy.spec.pooled:
        y += precisions * np.stack([case.mu for case in cases])
    solved = np.linalg.solve(np.linalg.cholesky(s), np.concatenate([phi.swapaxes(1, 2), y[..., None]], axis=2))
    roots = np.ascontiguousarray(solved[..., :-1].swapaxes(1, 2))
    means = np.matmul(roots, solved[..., -1:])[..., 0]
    drawn = np.matmul(roots, _noise(cases, size))
    drawn *= SCALE
    drawn += means[:, :, None]
    return [Ranking(mean, propensities(scores)) for mean, scores in zip(means, drawn, strict=True)]


def _noise(cases: Sequence[Case], size: int) -> Array:
    drawn = np.empty((len(cases), size, DRAWS))
    old = min(size, SPEC_V1.size)
    for place, case in enumerate(cases):
        random_streams.fill_normal(drawn[place, :old], case.decision_id, random_streams.OLD)
        if size > old:
            random_streams.fill_normal(drawn[place, old:], case.decision_id, random_streams.NEW)
    return drawn
