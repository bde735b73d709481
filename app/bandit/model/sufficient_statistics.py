"""Sufficient statistics of ridge regression per user: S = Σ φφᵀ, y = Σ rφ, and the number of decisions.

They exclude the prior, which belongs to the spec. So the statistics of one user serve every policy whose spec begins
with the same inputs: the champion reads the leading block, the challenger all of it.

Invariants:
- Statistics belong to one spec; those of another spec are rejected.
- Growing pads with zeros and learning adds element by element, so the leading block stays bit for bit what it would be
  without growth.
- Statistics that no decisions can have produced are not read: their numbers would enter the prior of every user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from app.bandit.model.inputs import STORED, Array, packed
from app.bandit.model.specs import Spec
from app.errors import SpecMismatch

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class SufficientStatistics:
    """S and y of the spec with `spec_hash`, which has `size` inputs, from `decisions` decisions. Never written to.

    `numbers` holds both as they are stored: the lower triangle of S row by row, then y. So S of the first inputs stands
    at the beginning, and to learn, to grow and to store take no matrix.
    """

    spec_hash: str
    size: int
    numbers: Array
    decisions: int

    @classmethod
    def none(cls, spec: Spec) -> SufficientStatistics:
        """The statistics of a new user."""
        return cls(spec.hash, spec.size, np.zeros(_length(spec.size)), 0)

    @property
    def s(self) -> Array:
        """S (D, D), symmetric; a copy."""
        return self.leading(self.size)[0]

    @property
    def y(self) -> Array:
        """y (D,); a copy."""
        return self.numbers[-self.size :].copy()

    def learned(self, phi: Array, reward: float) -> SufficientStatistics:
        """With one more decision. A φ from before growth, which is shorter, counts as followed by zeros.

        Raises SpecMismatch for a longer one, and for what `sound` would refuse: it would stay in the sums for ever.
        """
        known = len(phi)
        if known > self.size:
            raise SpecMismatch(f"a vector of {known} inputs, evidence of {self.size}")
        if not (max(phi.max(), -phi.min()) <= 1 + _ROUNDING and 0 <= reward <= 1):  # nor is it what is no number
            raise SpecMismatch("a decision to be learned holds what is no input or no reward")
        rows, columns = _triangle(known)
        numbers = self.numbers.copy()
        numbers[: len(rows)] += phi[rows] * phi[columns]
        y = len(numbers) - self.size
        numbers[y : y + known] += reward * phi
        return SufficientStatistics(self.spec_hash, self.size, numbers, self.decisions + 1)

    def grown(self, spec_from: Spec, spec_to: Spec) -> SufficientStatistics:
        """The same evidence under a longer spec. Raises SpecMismatch where `spec_from` is not its own, or no prefix."""
        if self.spec_hash != spec_from.hash:
            raise SpecMismatch(f"evidence is of spec {self.spec_hash[:12]}, not {spec_from.hash[:12]}")
        if not spec_from.prefix_of(spec_to):
            raise SpecMismatch(
                f"spec {spec_to.id} {spec_to.version} does not begin with {spec_from.id} {spec_from.version}"
            )
        numbers = np.zeros(_length(spec_to.size))
        y, y_grown = len(self.numbers) - self.size, len(numbers) - spec_to.size
        numbers[:y] = self.numbers[:y]
        numbers[y_grown : y_grown + self.size] = self.numbers[y:]
        return SufficientStatistics(spec_to.hash, spec_to.size, numbers, self.decisions)

    def leading(self, size: int) -> tuple[Array, Array]:
        """S and y of the first `size` inputs, as a policy that never saw the others would hold them; copies.

        Raises SpecMismatch where there are fewer.
        """
        if size > self.size:
            raise SpecMismatch(f"{size} inputs are wanted, evidence of {self.size}")
        # They lie in memory as those of evidence that never grew, and give the same results to the last bit.
        y = len(self.numbers) - self.size
        return self.numbers[_square(size)], self.numbers[y : y + size].copy()

    def pack(self) -> bytes:
        """The lower triangle of S row by row, then y, as little-endian float64."""
        return packed(self.numbers)

    @classmethod
    def unpack(cls, spec: Spec, blob: bytes, decisions: int) -> SufficientStatistics:
        """What `pack` gave, of a known spec. Raises SpecMismatch where it is none of that spec's, or not `sound`."""
        (stored,) = _stored(spec, [blob])
        numbers = stored.astype(np.float64, copy=False)
        # As in `sound`, in half its time: this is done for each decision.
        bordered = np.append(numbers, decisions)[_square(spec.size + 1)]
        within = np.abs(bordered).max() <= (1 + _ROUNDING) * decisions  # what is no number is not
        bordered.reshape(-1)[:: spec.size + 2] += _ROUNDING * (1 + decisions)
        if not within or not _semidefinite(bordered[None])[0]:
            raise SpecMismatch(f"no {decisions} decisions can have taught this evidence of {spec.id} {spec.version}")
        return cls(spec.hash, spec.size, numbers, decisions)

    @classmethod
    def summed(cls, spec: Spec, blobs: Sequence[bytes], decisions: int) -> SufficientStatistics:
        """The sum of what `pack` gave for several users, who learned from so many decisions together."""
        with np.errstate(over="ignore", invalid="ignore"):
            numbers: Array = _stored(spec, blobs).sum(axis=0, dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise SpecMismatch(f"evidence of spec {spec.id} {spec.version} holds what is no number")
        return cls(spec.hash, spec.size, numbers, decisions)


def _stored(spec: Spec, blobs: Sequence[bytes]) -> NDArray[np.float64]:
    """What `pack` gave, a row for each; it may be read only."""
    length = _length(spec.size)
    wanted = length * STORED.itemsize
    for blob in blobs:
        if len(blob) != wanted:
            raise SpecMismatch(f"{len(blob)} bytes of evidence, spec {spec.id} {spec.version} has {wanted}")
    return np.frombuffer(b"".join(blobs), STORED).reshape(-1, length)


def sound(spec: Spec, blobs: Sequence[bytes], decisions: Sequence[int]) -> list[bool]:
    """Whether decisions can have taught what `pack` gave for each of several users, who learned from so many each.

    Inputs are within [-1, 1] and rewards within [0, 1]: no sum over n decisions exceeds n. And [[S, y], [yᵀ, n]] is the
    sum of the outer products of (φ, r), with n in the place of Σr², which is no more: so it is positive semidefinite.
    """
    size = spec.size
    length = _length(size)
    whole = [place for place, blob in enumerate(blobs) if len(blob) == length * STORED.itemsize]
    numbers = np.frombuffer(b"".join([blobs[place] for place in whole]), STORED).reshape(-1, length)
    counts = np.array([decisions[place] for place in whole], np.float64)
    within = np.maximum(numbers.max(axis=1, initial=0), -numbers.min(axis=1, initial=0)) <= (1 + _ROUNDING) * counts
    found = [False] * len(blobs)
    if within.any():  # what is no number is not
        # What is packed is the lower triangle of that matrix, but for its corner; the upper one is not looked at.
        matrices = np.zeros((np.count_nonzero(within), (size + 1) ** 2))
        matrices[:, _places(size + 1)[:-1]] = numbers[within]
        matrices[:, -1] = counts[within]
        matrices[:, :: size + 2] += _ROUNDING * (1 + counts[within, None])
        judged = iter(_semidefinite(matrices.reshape(-1, size + 1, size + 1)))
        for place, fits in zip(whole, within, strict=True):
            found[place] = bool(fits) and next(judged)
    return found


def _semidefinite(matrices: Array) -> list[bool]:
    try:
        np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        if len(matrices) == 1:
            return [False]
        return [one for matrix in matrices for one in _semidefinite(matrix[None])]  # one of them is not: which?
    return [True] * len(matrices)


def _length(size: int) -> int:
    return size * (size + 1) // 2 + size


@lru_cache(maxsize=8)
def _places(size: int) -> NDArray[np.intp]:
    """Of the lower triangle, row by row, in a matrix that is one row of numbers."""
    rows, columns = _triangle(size)
    return rows * size + columns


@lru_cache(maxsize=8)
def _triangle(size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    rows, columns = np.tril_indices(size)
    return rows, columns


@lru_cache(maxsize=8)
def _square(size: int) -> NDArray[np.intp]:
    """Where in a lower triangle each number of the symmetric matrix stands, (size, size)."""
    rows, columns = _triangle(size)
    square = np.empty((size, size), np.intp)
    square[rows, columns] = square[columns, rows] = np.arange(len(rows))
    return square
