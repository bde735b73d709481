"""Sufficient statistics of ridge regression, per user, and the prior that is pooled from those of all users.

The statistics S = Σ φφᵀ, y = Σ rφ and n, the number of decisions, exclude the prior, which belongs to the spec. So
every policy whose spec begins with the same inputs can use them.

Invariants:
- Extending statistics to a longer spec ("growing") keeps their numbers, and learning adds element by element. So the
  numbers of the first inputs stay bit for bit what they would be without growing.
- Statistics that no n decisions can have produced are never used, since they would distort the prior of every user.

Each user's weights start from the mean of the pooled prior, μ = (Λ₀ + Σ S)⁻¹ Σ y, with sums over all users and
Λ₀ = 10 I: ridge regression over all decisions.
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
    candidate and its reward r. `numbers` (D(D+3)/2,) holds them as stored: the lower triangle of S row by row, then y.
    It is never modified. The triangle for the first k inputs is a prefix of the whole, so learning, growing and storing
    build no matrix."""

    spec: Spec
    numbers: Array
    decisions: int

    @classmethod
    def none(cls, spec: Spec) -> SufficientStatistics:
        """The statistics of a new user: zeros."""
        return cls(spec, np.zeros(_length(spec)), 0)

    def learned(self, phi: Array, reward: float) -> SufficientStatistics:
        """The statistics after one more decision. A φ that is shorter than D was logged under a shorter spec, and is
        padded with zeros. Raises `SpecMismatch` if φ is longer than D, or a number is NaN or outside its range."""
        known = len(phi)
        if known > self.spec.size:
            raise SpecMismatch(f"a vector of {known} inputs, statistics of {self.spec.size}")
        if not (max(phi.max(), -phi.min()) <= 1 + _ROUNDING and 0 <= reward <= 1):  # false for NaN, too
            raise SpecMismatch("the decision has an input outside [-1, 1] or a reward outside [0, 1]")
        rows, columns = _triangle(known)
        numbers = self.numbers.copy()
        numbers[: len(rows)] += phi[rows] * phi[columns]
        y = len(numbers) - self.spec.size
        numbers[y : y + known] += reward * phi
        return SufficientStatistics(self.spec, numbers, self.decisions + 1)

    def grown(self, spec: Spec, replayed: SufficientStatistics | None = None) -> SufficientStatistics:
        """The statistics extended to a longer spec. The sums over its additional inputs are taken from `replayed`,
        which has learned some or all of the same decisions under `spec`. Without it they are zeros. Raises
        `SpecMismatch` if `spec` does not begin with the inputs of the statistics' spec."""
        if not self.spec.prefix_of(spec):
            raise SpecMismatch(f"spec {spec.id} {spec.version} does not begin with {self.spec.id} {self.spec.version}")
        return self.of_common_inputs(spec, replayed)

    def of_common_inputs(self, spec: Spec, others: SufficientStatistics | None = None) -> SufficientStatistics:
        """The statistics under another spec. The sums over the inputs that both specs begin with are kept. The sums
        over the other inputs are taken from `others`; they are zeros if it is None."""
        others = others or SufficientStatistics.none(spec)
        pairs = zip(self.spec.inputs, spec.inputs, strict=False)
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        numbers, triangle = others.numbers.copy(), common * (common + 1) // 2
        y, y_others = len(self.numbers) - self.spec.size, len(numbers) - spec.size
        numbers[:triangle] = self.numbers[:triangle]
        numbers[y_others : y_others + common] = self.numbers[y : y + common]
        return SufficientStatistics(spec, numbers, self.decisions)

    def leading(self, size: int) -> tuple[Array, Array]:
        """Copies of S (size, size) and y (size,) for the first `size` inputs. Their memory layout is that of statistics
        that never grew, so results are the same to the last bit."""
        y = len(self.numbers) - self.spec.size
        return self.numbers[_square(size)], self.numbers[y : y + size].copy()

    def pack(self) -> bytes:
        """The statistics as stored: `numbers` as little-endian float64."""
        return packed(self.numbers)

    @classmethod
    def unpack(cls, spec: Spec, blob: bytes, decisions: int) -> SufficientStatistics:
        """Read statistics that `pack` wrote. Whether the blob is damaged is not checked: see `sound`."""
        return cls(spec, np.frombuffer(blob, STORED).astype(np.float64, copy=False), decisions)

    def plus(self, blobs: Sequence[bytes], decisions: int) -> SufficientStatistics:
        """Add undamaged packed statistics under the same spec, which have learned `decisions` decisions in total."""
        rows = np.frombuffer(b"".join(blobs), STORED).reshape(-1, len(self.numbers))
        numbers = self.numbers + rows.sum(axis=0, dtype=np.float64)
        return SufficientStatistics(self.spec, numbers, self.decisions + decisions)


def _length(spec: Spec) -> int:
    return spec.size * (spec.size + 3) // 2


def sound(spec: Spec, blob: bytes, decisions: int) -> bool:
    """Whether this number n of decisions can have produced the packed statistics S = Σφφᵀ and y = Σrφ, by two necessary
    conditions. Inputs φ are within [-1, 1] and rewards r within [0, 1], so no element exceeds n. And the matrix
    [[S, y], [yᵀ, n]] is positive semidefinite: it is Σ (φ, r)(φ, r)ᵀ, but for n instead of Σr², which is at most n."""
    if len(blob) != _length(spec) * NUMBER_BYTES:
        return False
    # With n, the packed numbers are the lower triangle of that matrix.
    matrix = np.append(np.frombuffer(blob, STORED), decisions)[_square(spec.size + 1)]
    if not np.abs(matrix).max() <= (1 + _ROUNDING) * decisions:  # true for NaN
        return False
    matrix.reshape(-1)[:: spec.size + 2] += _ROUNDING * (1 + decisions)
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


class Prior(msgspec.Struct, frozen=True, eq=False):
    """The mean `mu` (D,) from which a user's weights start, estimated from these numbers of users and decisions."""

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
    """Whether n = `decisions` decisions could give μ = (S + λI)⁻¹y, with λ = `SHRINKAGE`: every |μᵢ| ≤ √(n / 4λ), which
    is false for NaN. Proof: S = ΦᵀΦ, y = Φᵀr and 0 ≤ r ≤ 1 give yᵀS⁺y ≤ n. For every eigenvalue s of S, s / (s + λ)² ≤
    1 / 4λ. Hence |μ|² ≤ n / 4λ."""
    return bool((np.abs(mu) <= (1 + 1e-9) * np.sqrt(decisions / (4 * SHRINKAGE))).all())


def pooled_mean(total: SufficientStatistics) -> Array:
    """The prior mean μ (D,), from the sum of the statistics S and y of all users."""
    a, y = total.leading(total.spec.size)
    a.flat[:: total.spec.size + 1] += SHRINKAGE
    return np.asarray(np.linalg.solve(a, y), np.float64)


@lru_cache(maxsize=8)
def _triangle(size: int) -> tuple[Places, Places]:
    return np.tril_indices(size)


@lru_cache(maxsize=8)
def _square(size: int) -> Places:
    """An index array (size, size): the place of each element of the symmetric matrix in the packed lower triangle."""
    rows, columns = _triangle(size)
    square = np.empty((size, size), np.intp)
    square[rows, columns] = square[columns, rows] = np.arange(len(rows))
    return square
