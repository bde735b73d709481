"""Intervals that stay true however often people look: a bootstrap over users, at looks fixed beforehand.

*Users, not decisions, are drawn.* A user's decisions resemble each other, so n decisions say less than n users would.
Every figure is a ratio of two sums over users; so per-user sums are all that is needed, and a figure's replicate is a
product of how often each user was drawn and those sums. Figures that are bootstrapped together see the same users.

*Looks* are made at 1,000, 2,000, 4,000 ... evaluated decisions, whatever was seen before. Look k has the level
alpha_k = alpha / (k (k + 1)); these sum to alpha, since 1/(k (k+1)) = 1/k - 1/(k+1). By the union bound the chance
that any interval of any look misses is at most the sum of their levels, alpha, whenever one stops.

*The interval* is the bootstrap-t (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, chapter 12): each
replicate's distance from the estimate is divided by its own linearised standard error. It follows the skewness that
weights bring, where a plain percentile interval leans the wrong way. Quantiles further out than `RESOLVED` replicates
are not read off (a late look asks for one in 10,000) but extended from there as a normal tail would go on.

Randomness is handed in. Memory: one chunk of replicates, whatever the number of users.
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
_CHUNK = 1_000_000  # numbers of one chunk: 8 MB each for what was drawn and how often
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """A figure and its bounds."""

    value: float
    low: float
    high: float


def look_size(number: int) -> int:
    """At how many evaluated decisions look `number`, from 1, is made."""
    return int(FIRST_LOOK * 2 ** (number - 1))


def look_level(number: int, alpha: float = ALPHA) -> float:
    """The chance of missing that look `number` may take; over all looks these sum to `alpha`."""
    return alpha / (number * (number + 1))


def due_look(evaluated: int, made: int) -> int | None:
    """The look to make now, where `made` is the newest one made (0: none); None before the next is due.

    Where decisions came so quickly that several are due, it is the last of them; a look left out costs nothing.
    """
    newest = max(evaluated // FIRST_LOOK, 0).bit_length()
    return newest if newest > made else None


def bootstrap(
    parts: Floats, wholes: Floats, level: float, chance: np.random.Generator, replicates: int = REPLICATES
) -> list[Interval]:
    """Two-sided intervals of figures, each missing its truth with a chance of `level`.

    `parts` and `wholes` are (users, figures); a figure is the sum of its column of `parts` over that of `wholes`, which
    must not be 0. The same generator in the same state gives the same intervals.

    Raises:
        ValueError: there are fewer than two users, of whom none could be left out.
    """
    if len(parts) < 2:
        raise ValueError("an interval needs two users at least")
    totals = wholes.sum(axis=0)
    values = parts.sum(axis=0) / totals
    left = parts - values * wholes  # sums to 0: what is small is not lost beside what is large
    errors = np.sqrt(np.sum(left**2, axis=0)) / totals
    distances = _studentised(left, wholes, chance, replicates)
    return [
        _interval(float(value), float(error), distances[:, place], level)
        for place, (value, error) in enumerate(zip(values, errors, strict=True))
    ]


def standard_error(part: Floats, whole: Floats) -> float:
    """Of the ratio of two sums over users, linearised; infinite for fewer than two users."""
    if len(part) < 2:
        return math.inf
    left = part - part.sum() / whole.sum() * whole
    return float(np.sqrt(np.sum(left**2) * len(part) / (len(part) - 1)) / whole.sum())


def _studentised(left: Floats, wholes: Floats, chance: np.random.Generator, replicates: int) -> Floats:
    """(replicates, figures): how many of its own standard errors each replicate is away from the estimate."""
    users, figures = left.shape
    columns = np.hstack([left, wholes, left**2, left * wholes, wholes**2])
    chunk = max(1, min(replicates, _CHUNK // users))
    found = np.empty((replicates, figures))
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = _drawn(rows, users, chance)
        moved, total, squares, products, bases = np.split(drawn @ columns, 5, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            away = moved / total
            variance = np.maximum(squares - 2 * away * products + away**2 * bases, 0)
            found[start : start + rows] = moved / np.sqrt(variance)  # the totals cancel
    return found


def _drawn(rows: int, users: int, chance: np.random.Generator) -> Floats:
    """(rows, users): how often each user is among as many as there are, drawn with putting back."""
    places = chance.integers(0, users, (rows, users), dtype=np.uint32) + np.arange(rows)[:, None] * users
    return np.bincount(places.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _interval(value: float, error: float, distances: Floats, level: float) -> Interval:
    known = distances[np.isfinite(distances)]  # a replicate without spread, or of nothing, says nothing
    if error == 0 or not len(known):
        return Interval(value, value, value)
    tail = level / 2
    read = max(tail, min(0.25, RESOLVED / len(known)))
    stretch = _NORMAL.inv_cdf(tail) / _NORMAL.inv_cdf(read) if read > tail else 1.0
    low, high = np.quantile(known, [read, 1 - read]) * stretch
    return Interval(value, value - max(float(high), 0.0) * error, value - min(float(low), 0.0) * error)
