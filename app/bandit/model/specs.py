"""Specs: ordered, versioned lists of the inputs that a policy reads, with the prior precision of each input's weight.

Each input is the product of a candidate factor and a shared factor. A spec's hash covers formulas, constants and prior
precisions. It is stored with every vector and with every user's statistics, so numbers of two specs are never mixed.

Invariant: a longer spec begins with the inputs of the shorter one. So statistics of the shorter spec can be extended to
the longer one without learning again (`app.bandit.model.sufficient_statistics`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final

import msgspec
from msgspec.structs import asdict

from app.bandit.model.definitions import ONE, VERSIONS
from app.bandit.model.inputs import (
    CANDIDATE_FACTORS,
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

    def shorter(self) -> list[Spec]:
        """The other specs that this one begins with: statistics under them can be extended to this one."""
        return [spec for spec in SPECS.values() if spec != self and spec.prefix_of(self)]

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
            {**asdict(entry), "candidate": CANDIDATE_FACTORS[entry.candidate], "shared": SHARED_FACTORS[entry.shared]}
            for entry in self.inputs
        ]
        whole = {"id": self.id, "version": self.version, "pooled": self.pooled, "inputs": inputs}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _specs() -> Iterator[Spec]:
    inputs: list[Input] = []
    for number, version in enumerate(VERSIONS, 1):
        for pair in version.inputs:
            name = "_x_".join(factor for factor in pair if factor != ONE) or "intercept"
            inputs.append(Input(name, pair[1], pair[0], version.precision))
        yield Spec("tips", number, tuple(inputs), pooled=number > 1)


SPECS: Final = {spec.hash: spec for spec in _specs()}  # in the order of `VERSIONS`
SPEC_V1, SPEC_V2, *_ = SPECS.values()
NEWEST: Final = list(SPECS.values())[-1]
