"""Intervals for looks (interim analyses) and guardrails, which stay valid though computed again as decisions arrive.
`app/bandit/README.md` has the levels of the looks and the errors of the guardrails.

*Resampling users.* Every figure is a ratio of two sums over users. So per-user sums suffice, and a replicate weights
them by how often each user was drawn. Figures that are bootstrapped together use the same draws.

*The interval* is the bootstrap-t (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, section 12.5): the
distance of each replicate from the estimate is divided by the replicate's own linearised standard error. A bootstrap-t
follows the skewness that importance weights cause; a percentile interval would be shifted to the wrong side. A quantile
with fewer than `RESOLVED` replicates beyond it (a late look asks for 1 in 10,000) is extrapolated with the tail of a
normal distribution.

*Guardrails* have the bounds ± `GUARDRAIL_ERRORS` linearised standard errors for a mean. For a share they have the exact
bound of C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits, Biometrika 26, 1934.

Memory is one chunk of replicates, whatever the number of users.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from app.bandit.model.inputs import Array
from app.bandit.numpy_on_demand import np

ALPHA = 0.05
FIRST_LOOK = 4_000
REPLICATES = 4_000
RESOLVED = 20
GUARDRAIL_ERRORS = 4.0
GUARDRAIL_LEVEL = 1e-6
CHUNK = 1_000_000  # elements of one chunk: 8 MB for the draws, and 8 MB for their counts


class Interval(NamedTuple):
    """The same as `IntervalView`, but encoded as a JSON array, as in a stored look."""

    value: float
    low: float
    high: float


class IntervalView(msgspec.Struct):
    """An estimate and the bounds of its confidence interval. The sampling unit is the user, not the decision."""

    value: float
    low: float
    high: float


def look_number(evaluated: int) -> int:
    """The number of the look that is due at `evaluated` decisions: 0 (none) below 4,000, 1 from 4,000, 2 from 8,000, 3
    from 16,000 and so on. If several are due, only the last of them is made, at its own `look_level`."""
    return (evaluated // FIRST_LOOK).bit_length()


def look_level(number: int) -> float:
    """The level of look (interim analysis) `number`, 1 or higher: the probability with which each of its intervals
    misses the true value. The levels of all looks sum to `ALPHA`."""
    return ALPHA / (number * (number + 1))


def bootstrap(
    parts: Array, wholes: Array, level: float, generator: np.random.Generator, replicates: int = REPLICATES
) -> list[Interval]:
    """Compute two-sided intervals, each of which misses the true value with probability `level`. `parts` and `wholes`
    (users, figures) hold one row per user. Figure j is Σᵤ partsᵤⱼ / Σᵤ wholesᵤⱼ; the denominator must not be 0. Raises
    `ValueError` if there are fewer than two users."""
    if len(parts) < 2:
        raise ValueError("an interval needs at least two users")
    totals = wholes.sum(axis=0)
    values = parts.sum(axis=0) / totals
    residuals = parts - values * wholes  # sums to 0, so no precision is lost in the sums of replicates
    errors = np.sqrt(np.sum(residuals**2, axis=0)) / totals
    distances = _studentised(residuals, wholes, generator, replicates)
    return [
        _interval(float(value), float(error), distances[:, place], level)
        for place, (value, error) in enumerate(zip(values, errors, strict=True))
    ]


def standard_error(part: Array, whole: Array) -> float:
    """The linearised standard error of Σ part / Σ whole, sums over users; infinite below two users."""
    if len(part) < 2:
        return math.inf
    residuals = part - part.sum() / whole.sum() * whole
    return float(np.sqrt(np.sum(residuals**2) * len(part) / (len(part) - 1)) / whole.sum())


def guarded(part: Array, whole: Array) -> Interval:
    """The ratio Σ part / Σ whole, with the bounds of a guardrail: ± `GUARDRAIL_ERRORS` standard errors."""
    value, error = float(part.sum() / whole.sum()), standard_error(part, whole)
    return Interval(value, value - GUARDRAIL_ERRORS * error, value + GUARDRAIL_ERRORS * error)


def binomial_tail(count: int, n: int, p: float) -> float:
    """The probability that at least `count` of `n` independent events occur, each with the probability p, 0 < p < 1."""
    if count <= n * p:
        return 1.0 if count <= 0 else 1.0 - binomial_tail(n - count + 1, n, 1 - p)
    if count > n:
        return 0.0
    ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    term = total = math.exp(ways + count * math.log(p) + (n - count) * math.log1p(-p))
    for more in range(count, n):
        term *= (n - more) / (more + 1) * p / (1 - p)
        total += term
        if term <= 1e-17 * total:
            break
    return total


def share_bound(count: int, n: int, level: float = GUARDRAIL_LEVEL) -> float:
    """The exact lower bound (Clopper-Pearson) of the probability of an event that occurred `count` times in `n` trials.
    The bound is too high with a probability of at most `level`."""
    low, high = 0.0, count / n
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(count, n, middle) < level else (low, middle)
    return low


def _studentised(residuals: Array, wholes: Array, generator: np.random.Generator, replicates: int) -> Array:
    """Bootstrap t statistics (replicates, estimates): the distance of each replicate from the estimate, in units of the
    replicate's own standard error. For an estimate v, `residuals` (users, estimates) has parts - v · wholes."""
    users, figures = residuals.shape
    columns = np.hstack([residuals, wholes, residuals**2, residuals * wholes, wholes**2])
    chunk = max(1, min(replicates, CHUNK // users))
    found = np.empty((replicates, figures))
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        # How often each user occurs in each bootstrap sample (rows, users) of `users` draws with replacement.
        places = generator.integers(0, users, (rows, users), dtype=np.uint32) + np.arange(rows)[:, None] * users
        drawn = np.bincount(places.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)
        moved, total, squares, products, bases = np.split(drawn @ columns, 5, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = moved / total
            variance = np.maximum(squares - 2 * distance * products + distance**2 * bases, 0)
            found[start : start + rows] = moved / np.sqrt(variance)  # `total` cancels
    return found


def _interval(value: float, error: float, distances: Array, level: float) -> Interval:
    known = distances[np.isfinite(distances)]  # a replicate without variance, or with a denominator of 0, is left out
    if error == 0 or not len(known):
        return Interval(value, value, value)
    tail = level / 2
    read = max(tail, min(0.25, RESOLVED / len(known)))
    from statistics import NormalDist  # noqa: PLC0415  # takes a millisecond of the start

    normal = NormalDist()
    stretch = normal.inv_cdf(tail) / normal.inv_cdf(read) if read > tail else 1.0
    low, high = np.quantile(known, [read, 1 - read]) * stretch
    return Interval(value, value - max(float(high), 0.0) * error, value - min(float(low), 0.0) * error)
