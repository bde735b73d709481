"""Sufficient statistics of ridge regression, per user, and the prior that is pooled from those of all users.

The statistics are S = Σ φφᵀ, y = Σ rφ, and the number of decisions n. They exclude the prior, which belongs to the
spec. So every policy whose spec begins with the same inputs can use them: the champion reads the rows and columns of
the first inputs, the challenger reads all.

Invariants:
- Statistics belong to one spec; statistics of another spec are rejected.
- Extending statistics to a longer spec ("growing") keeps their numbers, and learning adds element by element. So the
  numbers of the first inputs stay bit for bit what they would be without growing.
- Statistics that no n decisions can have produced are never used, since they would distort the prior of every user.

The pooled prior is the mean μ from which each user's weights start:

    μ = (Λ₀ + Σ S)⁻¹ Σ y        sums over all users, Λ₀ = 10 I: ridge regression over all decisions

The sums include the user whose weights the prior is for. So with very few users, a user's statistics shape both the
prior and the posterior. The sums over ranges of users are stored, and a prior is made from these. It equals the prior
of one sum over all users except for rounding, since floating-point addition depends on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Final

import msgspec

from app.bandit.model.inputs import NUMBER_BYTES, STORED, Array, Places, Spec, packed
from app.bandit.numpy_on_demand import np
from app.errors import SpecMismatch

SHRINKAGE: Final = 10.0  # λ, the diagonal of Λ₀
_ROUNDING = 1e-9


class SufficientStatistics(msgspec.Struct, frozen=True, eq=False):
    """The sums S = Σ φφᵀ (D, D) and y = Σ rφ (D,) over the learned decisions of a user, with the inputs φ of the chosen
    candidate and its reward r. `spec` has D inputs.

    `numbers` (D(D+1)/2 + D,) holds them as stored: the lower triangle of S row by row, then y. It is never modified.
    The triangle for the first k inputs is a prefix of the whole, so learning, growing and storing build no matrix.
    """

    spec: Spec
    numbers: Array
    decisions: int

    @classmethod
    def none(cls, spec: Spec) -> SufficientStatistics:
        """The statistics of a new user: zeros."""
        return cls(spec, np.zeros(_length(spec.size)), 0)

    @property
    def size(self) -> int:
        return self.spec.size

    def learned(self, phi: Array, reward: float) -> SufficientStatistics:
        """The statistics after one more decision with inputs φ and reward r: S + φφᵀ, y + rφ and n + 1.

        A φ that is shorter than D was logged under a shorter spec, and is padded with zeros.

        Raises:
            SpecMismatch: φ is longer than D, |φᵢ| > 1 for some i, r is outside [0, 1], or one of them is NaN.
        """
        known = len(phi)
        if known > self.size:
            raise SpecMismatch(f"a vector of {known} inputs, statistics of {self.size}")
        if not (max(phi.max(), -phi.min()) <= 1 + _ROUNDING and 0 <= reward <= 1):  # false for NaN, too
            raise SpecMismatch("the decision has an input outside [-1, 1] or a reward outside [0, 1]")
        rows, columns = _triangle(known)
        numbers = self.numbers.copy()
        numbers[: len(rows)] += phi[rows] * phi[columns]
        y = len(numbers) - self.size
        numbers[y : y + known] += reward * phi
        return SufficientStatistics(self.spec, numbers, self.decisions + 1)

    def grown(self, spec: Spec, replayed: SufficientStatistics | None = None) -> SufficientStatistics:
        """The statistics extended to a longer spec. The sums over its additional inputs are taken from `replayed`,
        which has learned some or all of the same decisions under `spec`. Without it they are zeros.

        Raises:
            SpecMismatch: `spec` does not begin with the inputs of the statistics' spec.
        """
        if not self.spec.prefix_of(spec):
            raise SpecMismatch(f"spec {spec.id} {spec.version} does not begin with {self.spec.id} {self.spec.version}")
        return self._with_first_inputs(self.size, replayed or SufficientStatistics.none(spec))

    def of_common_inputs(self, spec: Spec) -> SufficientStatistics:
        """The statistics of the first inputs, as far as both specs have the same, under another spec: the rest is 0."""
        pairs = zip(self.spec.inputs, spec.inputs, strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return self._with_first_inputs(common, SufficientStatistics.none(spec))

    def _with_first_inputs(self, count: int, other: SufficientStatistics) -> SufficientStatistics:
        """The sums of the first `count` inputs from these statistics, and all others from `other`."""
        numbers, triangle = other.numbers.copy(), count * (count + 1) // 2
        y, y_other = len(self.numbers) - self.size, len(numbers) - other.size
        numbers[:triangle] = self.numbers[:triangle]
        numbers[y_other : y_other + count] = self.numbers[y : y + count]
        return SufficientStatistics(other.spec, numbers, self.decisions)

    def leading(self, size: int) -> tuple[Array, Array]:
        """Copies of S (size, size) and y (size,) for the first `size` inputs.

        Raises:
            SpecMismatch: the statistics have fewer than `size` inputs.
        """
        if size > self.size:
            raise SpecMismatch(f"{size} inputs requested, statistics of {self.size}")
        # The memory layout is that of statistics that never grew, so results are the same to the last bit.
        y = len(self.numbers) - self.size
        return self.numbers[_square(size)], self.numbers[y : y + size].copy()

    def pack(self) -> bytes:
        """The statistics as stored: `numbers` as little-endian float64."""
        return packed(self.numbers)

    @classmethod
    def unpack(cls, spec: Spec, blob: bytes, decisions: int) -> SufficientStatistics:
        """Read statistics that `pack` wrote. Whether the blob is damaged is not checked: see `sound`.

        Raises:
            SpecMismatch: the blob has the length of another spec.
        """
        (numbers,) = _stored(spec, [blob])
        return cls(spec, numbers.astype(np.float64, copy=False), decisions)

    def plus(self, blobs: Sequence[bytes], decisions: int) -> SufficientStatistics:
        """The sum of these and of packed statistics under the same spec, of this number of decisions in total.

        Raises:
            SpecMismatch: a blob has the length of another spec, or the sum contains NaN or infinity.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = self.numbers + _stored(self.spec, blobs).sum(axis=0, dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise SpecMismatch(f"statistics of spec {self.spec.id} {self.spec.version} contain NaN or infinity")
        return SufficientStatistics(self.spec, numbers, self.decisions + decisions)


def _stored(spec: Spec, blobs: Sequence[bytes]) -> Array:
    """Unpack the statistics of users, one row per blob: the lower triangle of S row by row, then y, D(D+1)/2 + D
    numbers. The array may be read-only. Raises `SpecMismatch` if a blob has another length."""
    length = _length(spec.size)
    wanted = length * NUMBER_BYTES
    for blob in blobs:
        if len(blob) != wanted:
            raise SpecMismatch(f"{len(blob)} bytes of statistics, spec {spec.id} {spec.version} has {wanted}")
    return np.frombuffer(b"".join(blobs), STORED).reshape(-1, length)


def sound(spec: Spec, blob: bytes, decisions: int) -> bool:
    """Whether this number n of decisions can have produced the packed statistics.

    Two necessary conditions are checked. Inputs are within [-1, 1] and rewards within [0, 1], so no element exceeds n.
    And [[S, y], [yᵀ, n]] is positive semidefinite: it is Σ (φ, r)(φ, r)ᵀ with n in the place of Σr² ≤ n.
    """
    size = spec.size
    if len(blob) != _length(size) * NUMBER_BYTES:
        return False
    # With n, the packed numbers are the lower triangle of that matrix.
    matrix = np.append(np.frombuffer(blob, STORED), decisions)[_square(size + 1)]
    if not np.abs(matrix).max() <= (1 + _ROUNDING) * decisions:  # true for NaN
        return False
    matrix.reshape(-1)[:: size + 2] += _ROUNDING * (1 + decisions)
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


class Prior(msgspec.Struct, frozen=True, eq=False):
    """The mean `mu` (D,) from which a user's weights start.

    `users` and `decisions` are the numbers of users and decisions it was estimated from. Version 0 stands for no
    estimate yet: `mu` is all zeros.
    """

    version: int
    spec: Spec
    mu: Array
    users: int
    decisions: int
    created_at_ms: int

    @classmethod
    def none(cls, spec: Spec) -> Prior:
        """The prior that is used until one has been estimated: version 0, all zeros."""
        return cls(0, spec, np.zeros(spec.size), 0, 0, 0)


def can_be_pooled(mu: Array, decisions: int) -> bool:
    """Whether n = `decisions` decisions could give μ = (S + λI)⁻¹y, with λ = `SHRINKAGE`: every |μᵢ| ≤ √(n / 4λ).

    With S = ΦᵀΦ, y = Φᵀr and rewards r in [0, 1], yᵀS⁺y ≤ n. For every eigenvalue s of S, s / (s + λ)² ≤ 1 / 4λ. Hence
    |μ|² ≤ n / 4λ. NaN and infinity fail the comparison.
    """
    return bool((np.abs(mu) <= (1 + 1e-9) * np.sqrt(decisions / (4 * SHRINKAGE))).all())


def pooled_mean(total: SufficientStatistics) -> Array:
    """The prior mean μ (D,), from the sum of the statistics S and y of all users."""
    a, y = total.leading(total.size)
    a.flat[:: total.size + 1] += SHRINKAGE
    return np.asarray(np.linalg.solve(a, y), np.float64)


def _length(size: int) -> int:
    return size * (size + 1) // 2 + size


@lru_cache(maxsize=8)
def _triangle(size: int) -> tuple[Places, Places]:
    rows, columns = np.tril_indices(size)
    return rows, columns


@lru_cache(maxsize=8)
def _square(size: int) -> Places:
    """An index array (size, size): the place of each element of the symmetric matrix in the packed lower triangle."""
    rows, columns = _triangle(size)
    square = np.empty((size, size), np.intp)
    square[rows, columns] = square[columns, rows] = np.arange(len(rows))
    return square
