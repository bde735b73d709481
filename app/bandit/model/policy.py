"""Linear Thompson sampling with exact propensities (Agrawal and Goyal, 2013).

The weights' posterior is N(θ̂, v²A⁻¹) with A = Λ + S and θ̂ = A⁻¹(Λμ + y). M draws of it give the share π̂(a) in which
each candidate is best; the policy is π(a) = (1-ε)π̂(a) + ε/K, and the action is sampled from that π. So the propensity
that is logged is exact, given the draws, and no importance weight exceeds K/ε. Since each draw is as likely as any
other to be the one that counts, M changes no action's probability: more draws only make the logged π less rough.

Owns the invariant that a policy sees the leading block of φ, of the evidence and of the randomness that its spec names,
and nothing beyond: so its answers are the same, bit for bit, before and after the evidence grows. Knows no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from app.bandit.model import random_streams
from app.bandit.model.inputs import Array
from app.bandit.model.specs import SPEC_V1, SPEC_V2, SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.errors import SpecMismatch

EPSILON: Final = 0.1
SCALE: Final = 0.2  # v
DRAWS: Final = 128  # M
TIE: Final = 1e-9  # scores closer than this are equal: rounding depends on a candidate's place in the matrix


class Posterior:
    """What is believed of the weights, N(`theta`, v²A⁻¹): from S, y, and the prior's precisions and mean, all (D,)."""

    def __init__(self, s: Array, y: Array, precisions: Array, mu: Array | None = None) -> None:
        a = s.copy()
        a.flat[:: len(y) + 1] += precisions
        self._root = np.linalg.cholesky(a)
        theta = np.linalg.solve(a, y if mu is None else precisions * mu + y)
        self.theta: Array = np.asarray(theta, np.float64)

    def means(self, phi: Array) -> Array:
        """Expected reward of each row of φ (K, D)."""
        return phi @ self.theta

    def roots(self, phi: Array) -> Array:
        """L⁻¹φᵀ, (D, K), where A = LLᵀ: standard normals e (D,) give the draw θ̂ + vL⁻ᵀe, so scores φθ̂ + v(L⁻¹φᵀ)ᵀe."""
        return np.asarray(np.linalg.solve(self._root, phi.T), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One decision's arithmetic. `means` and `pi` are (K,); `theta` (D,) makes the means."""

    means: Array
    pi: Array
    theta: Array


@dataclass(frozen=True)
class Policy:
    """A spec to score by, under a name of its own."""

    id: str
    spec: Spec

    def decide(self, decision_id: str, evidence: SufficientStatistics, mu: Array | None, phi: Array) -> Scored:
        """Scores φ (K, D), where D and the evidence may be of a spec that goes on after this policy's.

        `mu` is the pooled prior's mean; None is 0, and a policy whose spec is not pooled does not look at it. Raises
        SpecMismatch for evidence, φ or a mean that is not of a spec which begins with this policy's.
        """
        posterior = self.posterior(evidence, mu)
        mine = self._mine(phi)
        means = posterior.means(mine)
        drawn = means[:, None] + SCALE * (posterior.roots(mine).T @ noise(decision_id, self.spec.size))
        return Scored(means, propensities(drawn), posterior.theta)

    def posterior(self, evidence: SufficientStatistics, mu: Array | None) -> Posterior:
        """What this policy believes of its inputs' weights. Raises SpecMismatch as `decide` does."""
        if evidence.spec_hash not in self._readable:
            raise SpecMismatch(f"policy {self.id} cannot read evidence of spec {evidence.spec_hash[:12]}")
        if not self.spec.pooled:
            mu = None
        elif mu is not None and len(mu) != self.spec.size:
            raise SpecMismatch(f"policy {self.id} has {self.spec.size} inputs, the prior's mean {len(mu)}")
        return Posterior(*evidence.leading(self.spec.size), self.spec.precisions, mu)

    def _mine(self, phi: Array) -> Array:
        if phi.shape[1] < self.spec.size:
            raise SpecMismatch(f"policy {self.id} has {self.spec.size} inputs, the vectors {phi.shape[1]}")
        # In memory as a φ that never had more columns, for the same bits in every result.
        return np.ascontiguousarray(phi[:, : self.spec.size])

    @cached_property
    def _readable(self) -> frozenset[str]:
        known = (*SPECS.values(), self.spec)
        return frozenset(spec.hash for spec in known if self.spec.prefix_of(spec))


CHAMPION: Final = Policy("lints-v1", SPEC_V1)
CHALLENGER: Final = Policy("lints-v2", SPEC_V2)


def noise(decision_id: str, size: int, draws: int = DRAWS) -> Array:
    """A decision's standard normals (D, M). Those of the first inputs are the same for every policy, whatever its D."""
    drawn = np.empty((size, draws))
    old = min(size, SPEC_V1.size)
    random_streams.fill_normal(drawn[:old], decision_id, random_streams.OLD)
    if size > old:
        random_streams.fill_normal(drawn[old:], decision_id, random_streams.NEW)
    return drawn


def propensities(drawn: Array) -> Array:
    """π (K,) from scores under M draws (K, M): how often each is best, ties shared evenly, mixed with ε of chance."""
    candidates, draws = drawn.shape
    best = drawn >= drawn.max(axis=0) - TIE
    wins = np.count_nonzero(best, axis=1)
    if wins.sum() > draws:
        wins = (best / np.count_nonzero(best, axis=0)).sum(axis=1)
    pi: Array = (1 - EPSILON) * (wins / draws) + EPSILON / candidates
    return pi


def sample(pi: Array, decision_id: str) -> int:
    """The index of the action taken: over decision ids, i with probability π(i)."""
    draw = random_streams.uniform(decision_id, random_streams.ACTION)
    place = int(np.searchsorted(np.cumsum(pi), draw, side="right"))
    return min(place, len(pi) - 1)  # π sums to 1 but for rounding


def contributions(theta: Array, phi: Array) -> Array:
    """What each input adds to each score, (K, D) for `theta` (D,): the rows sum to the means."""
    return phi[:, : len(theta)] * theta
