"""Feature specs: which inputs a policy sees, in which order, and the prior that belongs to them.

A spec is an ordered, versioned list of named inputs, each the product of a term of the candidate and a term that all
candidates share. Its hash stands for all of it, formulas, constants and prior precisions included, and is stored with
every vector and every user's evidence, so that numbers of two specs are never mixed.

Owns the invariant that a longer spec begins with the shorter one, input by input, which is what lets a user's evidence
grow without being learned again (`app.bandit.model.sufficient_statistics`). Knows nothing of learning or storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from app.bandit.model.inputs import (
    CANDIDATE_TERMS,
    ONE,
    SHARED_TERMS,
    Array,
    Candidate,
    Context,
    Profile,
    terms_of,
)

_CANDIDATE_PLACE: Final = {name: place for place, name in enumerate(CANDIDATE_TERMS)}
_SHARED_PLACE: Final = {name: place for place, name in enumerate(SHARED_TERMS)}


@dataclass(frozen=True, slots=True)
class Input:
    """One number of φ: `candidate` times `shared`, both names of terms. `precision` is its prior's λ."""

    name: str
    candidate: str = ONE
    shared: str = ONE
    precision: float = 1.0


@dataclass(frozen=True)
class Spec:
    """An ordered list of inputs under a name and a version. `pooled` says where the prior's mean comes from.

    Not pooled: the mean is 0. Pooled: it is learned from all users' evidence (`app.bandit.model.pooled_prior`).
    """

    id: str
    version: int
    inputs: tuple[Input, ...]
    pooled: bool = False

    @property
    def size(self) -> int:
        """How many numbers φ has."""
        return len(self.inputs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The inputs' names, in the order of φ."""
        return tuple(entry.name for entry in self.inputs)

    @cached_property
    def precisions(self) -> Array:
        """The diagonal of Λ: how firmly the prior holds each input's weight at its mean."""
        return np.array([entry.precision for entry in self.inputs])

    @cached_property
    def hash(self) -> str:
        """SHA-256 in hexadecimal of the canonical spec: any change of meaning is another hash."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def prefix_of(self, other: Spec) -> bool:
        """Whether `other` begins with exactly these inputs."""
        return other.inputs[: self.size] == self.inputs

    def phi(self, candidates: Sequence[Candidate], context: Context, profile: Profile) -> Array:
        """φ of every candidate, (K, size): bounded, finite, and the same for the same request for ever."""
        return self.joined(*terms_of(candidates, context, profile))

    def joined(self, by_candidate: Array, shared: Array) -> Array:
        """φ from the terms of candidates (…, K, terms) and of their requests (…, terms)."""
        candidate_places, shared_places = self._places
        return by_candidate.take(candidate_places, axis=-1) * shared.take(shared_places, axis=-1)[..., None, :]

    @cached_property
    def _places(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        return (
            np.array([_CANDIDATE_PLACE[entry.candidate] for entry in self.inputs]),
            np.array([_SHARED_PLACE[entry.shared] for entry in self.inputs]),
        )

    def _canonical(self) -> str:
        inputs = [
            {
                "name": entry.name,
                "candidate": CANDIDATE_TERMS[entry.candidate],
                "shared": SHARED_TERMS[entry.shared],
                "precision": entry.precision,
            }
            for entry in self.inputs
        ]
        whole = {"id": self.id, "version": self.version, "pooled": self.pooled, "inputs": inputs}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def least_precision(decisions: int) -> float:
    """The λ from which v2's new block z adds at most 10 % to a score's standard deviation, when evidence of up to
    `decisions` decisions has just grown: whoever the user, the candidate and the profile.

    To be kept: √(xᵀ(I+S)⁻¹x + |z|²/λ) ≤ 1.1 √(xᵀ(I+S)⁻¹x), so λ ≥ |z|² / (0.21 xᵀ(I+S)⁻¹x).
    By Cauchy and Schwarz, with xᵢ learned and |xᵢ|² ≤ 5: xᵀ(I+S)⁻¹x ≥ |x|⁴/(|x|² + Σ(x·xᵢ)²) ≥ |x|²/(1 + 5n).
    With the candidate's own terms c, |c|² ≤ 3, a time given and a preferred hour known: |x|² = 2 + |c|², and
    |z|² ≤ 1 + p|c|², p = 4/9 + 4/9 + 1/4 + 1/4 + 1. Their ratio is largest at |c|² = 3: 49/30. The other cases (no
    time, no preferred hour) stay below. It is reached by a user who saw one candidate n times, and again.
    """
    return 49 / 30 * (1 + 5 * decisions) / 0.21


# A thousand decisions are more than most users make in a year, and a firm prior costs nothing: the pooled prior
# (`app.bandit.model.pooled_prior`) learns what a profile is worth, and the old block a user's own deviation from it.
GROWN_WITHIN: Final = 1000
NEW_PRECISION: Final = 39_000.0  # least_precision(GROWN_WITHIN), rounded up

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
            Input(f"{term}_x_{candidate}", candidate, term, NEW_PRECISION)
            for term in _OF_PROFILE
            for candidate in _OF_CANDIDATE
        ),
    ),
    pooled=True,
)
SPECS: Final = {spec.hash: spec for spec in (SPEC_V1, SPEC_V2)}
