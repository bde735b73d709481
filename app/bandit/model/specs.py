"""Specs: ordered, versioned lists of the inputs that a policy reads, with the prior precision of each input's weight.

Each input is the product of a candidate factor and a shared factor. A spec's hash covers formulas, constants and prior
precisions. It is stored with every vector and with every user's statistics, so numbers of two specs are never mixed.

Invariant: a longer spec begins with the inputs of the shorter one. So statistics of the shorter spec can be extended to
the longer one without learning again (`app.bandit.model.sufficient_statistics`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import msgspec

from app.bandit.model.inputs import (
    CANDIDATE_FACTORS,
    ONE,
    SHARED_FACTORS,
    Array,
    Candidate,
    Context,
    Places,
    Profile,
    candidate_factors,
    shared_factors,
)
from app.bandit.numpy_on_demand import np


class Input(msgspec.Struct, frozen=True):
    """One component of an input vector φ: the product of the factors with the names `candidate` and `shared`.
    `precision` is the prior precision λ of its weight."""

    name: str
    candidate: str = ONE
    shared: str = ONE
    precision: float = 1.0


class Spec(msgspec.Struct, frozen=True, dict=True):
    """An ordered list of inputs. If `pooled`, the prior mean of their weights is estimated from all users; otherwise
    0."""

    id: str
    version: int
    inputs: tuple[Input, ...]
    pooled: bool = False

    @property
    def size(self) -> int:
        """The number of inputs, D in formulas."""
        return len(self.inputs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.inputs)

    @cached_property
    def precisions(self) -> Array:
        """The prior precisions (D,), the diagonal of Λ."""
        return np.array([entry.precision for entry in self.inputs])

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of the spec as canonical JSON, which contains formulas and precisions."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def prefix_of(self, other: Spec) -> bool:
        """Whether the first inputs of `other` are the inputs of this spec, in the same order."""
        return other.inputs[: self.size] == self.inputs

    def phi(self, candidates: Sequence[Candidate], context: Context, profile: Profile) -> Array:
        """The input vectors φ (K, D), one row per candidate, with finite components within [-1, 1]."""
        return self.phi_from(candidate_factors(candidates), shared_factors(context, profile))

    def phi_from(self, by_candidate: Array, shared: Array) -> Array:
        """The input vectors φ (…, K, D), from the factors of one request or, with a leading axis, of many."""
        candidate_places, shared_places = self._places
        return by_candidate.take(candidate_places, axis=-1) * shared.take(shared_places, axis=-1)[..., None, :]

    @cached_property
    def _places(self) -> tuple[Places, Places]:
        candidate, shared = list(CANDIDATE_FACTORS), list(SHARED_FACTORS)
        return (
            np.array([candidate.index(entry.candidate) for entry in self.inputs]),
            np.array([shared.index(entry.shared) for entry in self.inputs]),
        )

    def _canonical(self) -> str:
        inputs = [
            {
                "name": entry.name,
                "candidate": CANDIDATE_FACTORS[entry.candidate],
                "shared": SHARED_FACTORS[entry.shared],
                "precision": entry.precision,
            }
            for entry in self.inputs
        ]
        whole = {"id": self.id, "version": self.version, "pooled": self.pooled, "inputs": inputs}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# The prior precision λ of v2's added inputs: the smallest with which they raise a score's standard deviation by at most
# 10 %, rounded up. This holds for every user with at most n = `GROWN_WITHIN` decisions, every candidate and every
# profile. Let x be the inputs of spec v1 and z those that v2 adds. The condition √(xᵀ(I+S)⁻¹x + |z|²/λ) ≤
# 1.1 √(xᵀ(I+S)⁻¹x) means λ ≥ |z|² / (0.21 xᵀ(I+S)⁻¹x), which is at most 49/30 (1 + 5n) / 0.21:
#
# 1. Let xᵢ be the learned vectors, |xᵢ|² ≤ 5. By Cauchy-Schwarz, xᵀ(I+S)⁻¹x ≥ |x|⁴ / (|x|² + Σ(x·xᵢ)²) ≥ |x|²/(1+5n).
# 2. Let c be the candidate's own factors, |c|² ≤ 3. With a time and a preferred hour, |x|² = 2 + |c|² and
#    |z|² ≤ 1 + p|c|² with p = 4/9 + 4/9 + 1/4 + 1/4 + 1. The ratio |z|²/|x|² is largest at |c|² = 3: 49/30.
#    Without a time or a preferred hour it is smaller.
#
# A user who saw one candidate n times and sees it again reaches the bound. 1,000 is more decisions than most users make
# in a year. A high precision costs nothing: the pooled prior learns the effect of a profile feature
# (`app.bandit.model.pooled_prior`), and the weights of v1's inputs learn a user's own deviation.
GROWN_WITHIN: Final = 1000
NEW_PRECISION: Final = 39_000.0

_PLAIN = (
    Input("intercept"),
    Input("is_overdue", candidate="is_overdue"),
    Input("task_age", candidate="task_age"),
    Input("priority", candidate="priority"),
    Input("hour_cos", shared="hour_cos"),
    Input("hour_sin", shared="hour_sin"),
)
_OF_PROFILE = ("completion", "dismissal", "dwell", "volume", "hour_distance_cos", "hour_distance_sin")
_OF_CANDIDATE = ("is_overdue", "task_age", "priority")

SPEC_V1: Final = Spec("tips", 1, _PLAIN)
SPEC_V2: Final = Spec(
    "tips",
    2,
    (
        *_PLAIN,
        Input("profile_present", shared="profile_present", precision=NEW_PRECISION),
        *(
            Input(f"{shared}_x_{candidate}", candidate, shared, NEW_PRECISION)
            for shared in _OF_PROFILE
            for candidate in _OF_CANDIDATE
        ),
    ),
    pooled=True,
)
SPECS: Final = {spec.hash: spec for spec in (SPEC_V1, SPEC_V2)}
