"""Many decisions of one policy, scored together: the same arithmetic as `Policy.decide`, a fraction of the time.

Invariant: each result is that of `Policy.decide` but for rounding, whatever it is scored together with. What is done
for many at once, NumPy does outside of Python's lock, so that a thread which does it leaves the event loop alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from app.bandit import streams
from app.bandit.evidence import Evidence
from app.bandit.policy import DRAWS, SCALE, Policy, Scored, propensities
from app.bandit.specs import SPEC_V1
from app.bandit.terms import Array


class Case(NamedTuple):
    """One decision to be scored, as `Policy.decide` takes it."""

    decision_id: str
    evidence: Evidence
    mu: Array
    phi: Array


def decide_together(policy: Policy, cases: Sequence[Case]) -> list[Scored]:
    """As `Policy.decide` of each, for cases with the same number of candidates. Evidence is of specs that it reads."""
    size = policy.spec.size
    s, y = (np.stack(each) for each in zip(*(case.evidence.leading(size) for case in cases), strict=True))
    phi = np.stack([case.phi[:, :size] for case in cases])
    precisions = policy.spec.precisions
    s[:, np.arange(size), np.arange(size)] += precisions
    if policy.spec.pooled:
        y += precisions * np.stack([case.mu for case in cases])
    theta = np.linalg.solve(s, y[..., None])[..., 0]
    means = np.matmul(phi, theta[..., None])[..., 0]
    roots = np.linalg.solve(np.linalg.cholesky(s), phi.swapaxes(1, 2))
    drawn = np.matmul(roots.swapaxes(1, 2), _noise(cases, size))
    drawn *= SCALE
    drawn += means[:, :, None]
    pi = [propensities(scores) for scores in drawn]
    variances = np.einsum("bdk,bdk->bk", roots, roots)
    return [Scored(*rows) for rows in zip(means, variances, pi, theta, strict=True)]


def _noise(cases: Sequence[Case], size: int) -> Array:
    drawn = np.empty((len(cases), size, DRAWS))
    old = min(size, SPEC_V1.size)
    for place, case in enumerate(cases):
        streams.fill_normal(drawn[place, :old], case.decision_id, streams.OLD)
        if size > old:
            streams.fill_normal(drawn[place, old:], case.decision_id, streams.NEW)
    return drawn
