"""Bootstrap intervals that stay valid although they are looked at repeatedly.

*Resampling users.* Decisions of one user resemble each other, so the bootstrap draws users, not decisions. Every figure
is a ratio of two sums over users. So per-user sums suffice, and a replicate is the product of those sums and how often
each user was drawn. Figures that are bootstrapped together use the same draws.

*Looks* are made at 1,000, 2,000, 4,000, … evaluated decisions, independent of earlier results. Look k has the level
α_k = α / (k (k + 1)); the levels sum to α, since 1 / (k (k + 1)) = 1/k - 1/(k + 1). By the union bound, the probability
that any interval of any look misses is at most α, whenever one stops.

*The interval* is the bootstrap-t (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, section 12.5): the
distance of each replicate from the estimate is divided by the replicate's own linearised standard error. It follows the
skewness that importance weights cause; a percentile interval would be shifted to the wrong side. A quantile with fewer
than `RESOLVED` replicates beyond it (a late look asks for 1 in 10,000) is extrapolated with the tail of a normal
distribution.

The random generator is passed in. Memory is one chunk of replicates, whatever the number of users.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from app.bandit.rollout.off_policy import Floats

ALPHA = 0.05
FIRST_LOOK = 1_000
REPLICATES = 4_000
RESOLVED = 20
CHUNK = 1_000_000  # elements of one chunk: 8 MB for the draws, and 8 MB for their counts
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """An estimate and its bounds."""

    value: float
    low: float
    high: float


def look_size(number: int) -> int:
    """The number of evaluated decisions at which look `number` (from 1) is due."""
    return int(FIRST_LOOK * 2 ** (number - 1))


def look_level(number: int, alpha: float = ALPHA) -> float:
    """α_k of look `number`: the probability that one of its intervals misses. The sum over all looks is `alpha`."""
    return alpha / (number * (number + 1))


def due_look(evaluated: int, made: int) -> int | None:
    """The number of the look that is due, or None; `made` is the newest one made (0: none).

    If several are due, it is the last of them. Skipping looks does not invalidate the levels.
    """
    newest = max(evaluated // FIRST_LOOK, 0).bit_length()
    return newest if newest > made else None


def bootstrap(
    parts: Floats, wholes: Floats, level: float, generator: np.random.Generator, replicates: int = REPLICATES
) -> list[Interval]:
    """Two-sided intervals for ratios of sums, each missing the true value with probability `level`.

    `parts` and `wholes` are (users, figures). Figure j is Σᵤ partsᵤⱼ / Σᵤ wholesᵤⱼ; the denominator must not be 0. A
    generator in the same state gives the same intervals.

    Raises:
        ValueError: there are fewer than two users.
    """
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


def standard_error(part: Floats, whole: Floats) -> float:
    """The linearised standard error of Σ part / Σ whole over users (users,); infinite for fewer than two users."""
    if len(part) < 2:
        return math.inf
    residuals = part - part.sum() / whole.sum() * whole
    return float(np.sqrt(np.sum(residuals**2) * len(part) / (len(part) - 1)) / whole.sum())


def _studentised(residuals: Floats, wholes: Floats, generator: np.random.Generator, replicates: int) -> Floats:
    """(replicates, figures): each replicate's distance from the estimate, in units of its own standard error."""
    users, figures = residuals.shape
    columns = np.hstack([residuals, wholes, residuals**2, residuals * wholes, wholes**2])
    chunk = max(1, min(replicates, CHUNK // users))
    found = np.empty((replicates, figures))
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = _drawn(rows, users, generator)
        moved, total, squares, products, bases = np.split(drawn @ columns, 5, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = moved / total
            variance = np.maximum(squares - 2 * distance * products + distance**2 * bases, 0)
            found[start : start + rows] = moved / np.sqrt(variance)  # `total` cancels
    return found


def _drawn(rows: int, users: int, generator: np.random.Generator) -> Floats:
    """(rows, users): how often each user occurs in a sample of as many users, drawn with replacement."""
    places = generator.integers(0, users, (rows, users), dtype=np.uint32) + np.arange(rows)[:, None] * users
    return np.bincount(places.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _interval(value: float, error: float, distances: Floats, level: float) -> Interval:
    known = distances[np.isfinite(distances)]  # a replicate without variance, or with a denominator of 0, is left out
    if error == 0 or not len(known):
        return Interval(value, value, value)
    tail = level / 2
    read = max(tail, min(0.25, RESOLVED / len(known)))
    stretch = _NORMAL.inv_cdf(tail) / _NORMAL.inv_cdf(read) if read > tail else 1.0
    low, high = np.quantile(known, [read, 1 - read]) * stretch
    return Interval(value, value - max(float(high), 0.0) * error, value - min(float(low), 0.0) * error)
