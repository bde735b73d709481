"""The pooled prior: what all users together have taught, as the mean from which each user's learning starts.

    μ = (Λ₀ + Σ S)⁻¹ Σ y        over the evidence of all users

A user's own profile hardly varies, so one user's decisions cannot tell what a profile is worth; those of all users can.
A prior has a version, and a decision names the one it used. A user's own evidence is in the pool as well, so among very
few users it counts twice. Knows nothing of where evidence is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from app.bandit.model.inputs import Array
from app.bandit.model.specs import SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.errors import SpecMismatch

SHRINKAGE: Final = 10.0  # the diagonal of Λ₀


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """μ (D,) of the spec with `spec_hash`, from so many users and decisions. Version 0 is before anything is pooled."""

    version: int
    spec_hash: str
    mu: Array
    users: int
    decisions: int
    created_at_ms: int

    @classmethod
    def none(cls, spec: Spec) -> Prior:
        """The prior of version 0: all zeros."""
        return cls(0, spec.hash, np.zeros(spec.size), 0, 0, 0)


def can_be_pooled(mu: Array, decisions: int) -> bool:
    """Whether so many decisions can have taught this mean.

    Rewards are within [0, 1], so yᵀS⁻¹y is at most n; and s / (s + λ)² is at most 1 / 4λ, whatever s. Hence |μ|² is at
    most n / 4λ. What is no number is no mean either.
    """
    return bool((np.abs(mu) <= (1 + 1e-9) * np.sqrt(decisions / (4 * SHRINKAGE))).all())


class Pool:
    """Sums evidence user by user, in memory that does not grow with their number."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._s = np.zeros((spec.size, spec.size))
        self._y = np.zeros(spec.size)
        self.users = 0
        self.decisions = 0

    def add(self, evidence: SufficientStatistics) -> None:
        """One user's. Those of a spec that this one begins with count as grown; any other raises SpecMismatch."""
        if evidence.spec_hash != self._spec.hash:
            known = SPECS.get(evidence.spec_hash)
            if known is None or not known.prefix_of(self._spec):
                raise SpecMismatch(f"evidence of spec {evidence.spec_hash[:12]} does not belong to this pool")
        self._count(evidence, 1)

    def add_packed(self, spec_hash: str, blobs: Sequence[bytes], decisions: int) -> None:
        """Many users' of one spec, as stored: a hundred times faster than one by one. `decisions` is of all of them."""
        spec = SPECS.get(spec_hash)
        if spec is None or not spec.prefix_of(self._spec):
            raise SpecMismatch(f"evidence of spec {spec_hash[:12]} does not belong to this pool")
        self._count(SufficientStatistics.summed(spec, blobs, decisions), len(blobs))

    def _count(self, evidence: SufficientStatistics, users: int) -> None:
        size = evidence.size
        self._s[:size, :size] += evidence.s
        self._y[:size] += evidence.y
        self.users += users
        self.decisions += evidence.decisions

    def mean(self) -> Array:
        """μ (D,)."""
        a = self._s.copy()
        a.flat[:: self._spec.size + 1] += SHRINKAGE
        return np.asarray(np.linalg.solve(a, self._y), np.float64)

    def prior(self, version: int, now_ms: int) -> Prior:
        """The prior as of now."""
        return Prior(version, self._spec.hash, self.mean(), self.users, self.decisions, now_ms)
