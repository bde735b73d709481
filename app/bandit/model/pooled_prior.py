"""The pooled prior: the prior mean μ of each user's weights, estimated from the statistics S and y of all users.

    μ = (Λ₀ + Σ S)⁻¹ Σ y        sums over all users, Λ₀ = 10 I: ridge regression over all decisions

The sums include the user whose weights the prior is for. So with very few users, a user's statistics shape both the
prior and the posterior. The sums over ranges of users are stored, and a prior is made from these. It equals the prior
of one sum over all users except for rounding, since floating-point addition depends on the order.
"""

from __future__ import annotations

from typing import Final

import msgspec

from app.bandit.model.inputs import Array, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.numpy_on_demand import np

SHRINKAGE: Final = 10.0  # λ, the diagonal of Λ₀


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
