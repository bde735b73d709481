"""Linear Thompson sampling with exact propensities (Agrawal and Goyal, 2013).

The weights' posterior is N(θ̂, v²A⁻¹) with A = Λ + S and θ̂ = A⁻¹(Λμ + y). M draws of it give the share π̂(a) in which
each candidate is best; the policy is π(a) = (1-ε)π̂(a) + ε/K, and the action is sampled from that π. So the propensity
that is logged is exact, given the draws, and no importance weight exceeds K/ε.

Owns the invariant that a policy sees the leading block of φ, of the evidence and of the randomness that its spec names,
and nothing beyond: so its answers are the same, bit for bit, before and after the evidence grows. Knows no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from app.bandit import streams
from app.bandit.evidence import Evidence
from app.bandit.specs import SPEC_V1, SPEC_V2, SPECS, Spec
from app.bandit.terms import Array
from app.errors import SpecMismatch

EPSILON: Final = 0.1
SCALE: Final = 0.3  # v
DRAWS: Final = 128  # M


class Posterior:
    """What is believed of the weights: evidence `s` (D, D) and `y` (D,), prior precisions (D,) and mean `mu` (D,)."""

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
        """L⁻¹φᵀ, (D, K), where A = LLᵀ: its columns' squares sum to φᵀA⁻¹φ."""
        return np.asarray(np.linalg.solve(self._root, phi.T), np.float64)

    def variances(self, phi: Array) -> Array:
        """φᵀA⁻¹φ of each row, without the factor v²."""
        roots = self.roots(phi)
        return np.asarray(np.einsum("dk,dk->k", roots, roots), np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One decision's arithmetic. All (K,), but `theta` (D,): the weights that the means are made of."""

    means: Array
    variances: Array
    pi: Array
    theta: Array


@dataclass(frozen=True)
class Policy:
    """A spec to score by, under a name of its own."""

    id: str
    spec: Spec

    def decide(self, decision_id: str, evidence: Evidence, mu: Array | None, phi: Array) -> Scored:
        """Scores φ (K, D), where D and the evidence may be of a spec that goes on after this policy's.

        `mu` is the pooled prior's mean; None is 0, and a policy whose spec is not pooled does not look at it. Raises
        SpecMismatch for evidence of a spec that does not begin with this one.
        """
        if evidence.spec_hash not in self._readable:
            raise SpecMismatch(f"policy {self.id} cannot read evidence of spec {evidence.spec_hash[:12]}")
        size = self.spec.size
        s, y = evidence.leading(size)
        mine = np.ascontiguousarray(phi[:, :size])
        posterior = Posterior(s, y, self.spec.precisions, mu if self.spec.pooled else None)
        means, roots = posterior.means(mine), posterior.roots(mine)
        scores = means + SCALE * (noise(decision_id, size) @ roots)
        return Scored(means, np.einsum("dk,dk->k", roots, roots), propensities(scores), posterior.theta)

    @cached_property
    def _readable(self) -> frozenset[str]:
        known = (*SPECS.values(), self.spec)
        return frozenset(spec.hash for spec in known if self.spec.prefix_of(spec))


CHAMPION: Final = Policy("lints-v1", SPEC_V1)
CHALLENGER: Final = Policy("lints-v2", SPEC_V2)


def noise(decision_id: str, size: int, draws: int = DRAWS) -> Array:
    """Standard normals (M, D) of a decision. The first inputs' are the same for every policy, whatever its size."""
    old = min(size, SPEC_V1.size)
    first = streams.normals(decision_id, streams.OLD, (draws, old))
    if size == old:
        return first
    return np.hstack([first, streams.normals(decision_id, streams.NEW, (draws, size - old))])


def propensities(scores: Array) -> Array:
    """π (K,) from drawn scores (M, K): how often each is best, ties shared evenly, mixed with ε of pure chance."""
    draws, candidates = scores.shape
    best = scores == scores.max(axis=1, keepdims=True)
    shares = (best / best.sum(axis=1, keepdims=True)).sum(axis=0) / draws
    pi: Array = (1 - EPSILON) * shares + EPSILON / candidates
    return pi


def sample(pi: Array, decision_id: str) -> int:
    """The index of the action taken: i with probability π(i), over decision ids."""
    place = int(np.searchsorted(np.cumsum(pi), streams.uniform(decision_id, streams.ACTION), side="right"))
    return min(place, len(pi) - 1)  # π sums to 1 but for rounding


def greedy(means: Array) -> int:
    """The index of the best mean, the first of those that tie."""
    return int(np.argmax(means))


def contributions(theta: Array, phi: Array) -> Array:
    """What each input adds to each score, (K, D): the rows sum to the means."""
    return phi[:, : len(theta)] * theta
