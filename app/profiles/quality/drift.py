"""Measures drift: how far apart two populations of values are, counted in common bins.

The population stability index (PSI) over bins with shares `now_i` and `before_i`:

    PSI = sum over i of (now_i - before_i) * ln(now_i / before_i)

It is the symmetric form of the Kullback-Leibler divergence (Jeffreys), never negative, and 0 if the shares are equal.
Usual bands: below 0.1 stable, 0.1 to 0.25 moderate, above 0.25 major (N. Siddiqi: Credit Risk Scorecards, 2006).
`SMOOTHING` is added to each share, and the shares are divided by their new sum, so a bin that is empty on one side does
not give infinity and equal shares stay equal. Chance alone gives about (bins - 1) * (1/n + 1/m) for populations of n
and m users (B. Yurdakul: Statistical properties of the population stability index, 2018). If that is more than
`MOST_NOISE`, or a side has fewer than `FEWEST` users, the PSI is not computed.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeVar

import msgspec

from app.features.registry import Dtype, Scalar

BINS = 10
MAX_CATEGORIES = 24
SMOOTHING = 1e-4
FEWEST = 100
MOST_NOISE = 0.06
MODERATE, MAJOR = 0.1, 0.25
TINY, HUGE = 1e-6, 1e12
_TAIL = 0.01
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
Band = Literal["stable", "moderate", "major"]
N = TypeVar("N", int, float)


class CommonBin(msgspec.Struct):
    """A bin of a feature's values, and how many users had a value in it now and before.

    A bin of kind `value` is one category, and `other` is every further category. A `range` includes `from` and excludes
    `to`; the last range of floats includes both. If the first or last range also counts values that lie outside it, its
    outer edge is null.
    """

    now: int
    before: int
    kind: Literal["range", "value", "other", "null"] = msgspec.field(default="range")
    value: Scalar = None
    start: float | None = msgspec.field(default=None, name="from")
    end: float | None = msgspec.field(default=None, name="to")


def common_bins(dtype: Dtype, now: Counter[Scalar], before: Counter[Scalar]) -> list[CommonBin]:
    """Count both populations in the same bins; each user falls into one bin. The bins for null and for the texts beyond
    the `MAX_CATEGORIES` most frequent ones are left out if empty."""
    bins = _texts(now, before) if dtype == "str" else _numbers(dtype, numbers(now), numbers(before))
    if now[None] or before[None]:
        bins.append(CommonBin(now[None], before[None], "null"))
    return bins


def numbers(values: Mapping[Scalar, int]) -> Counter[float]:
    """The counts of the numbers among the values. Numbers are clipped to ±`HUGE`; numbers within ±`TINY` count as 0."""
    counts: Counter[float] = Counter()
    for value, count in values.items():
        if isinstance(value, int | float):
            counts[0.0 if abs(value) <= TINY else float(min(max(value, -HUGE), HUGE))] += count
    return counts


def quantiles(found: Iterable[N], shares: Sequence[float]) -> list[N | None]:
    """The quantile of the numbers for each share (0 to 1), by nearest rank; all None if there is no number."""
    ranked = sorted(found)
    return [ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None for share in shares]


def psi(bins: Sequence[CommonBin]) -> float:
    """The population stability index. Neither population may be empty."""
    total_now, total_before = sum(part.now for part in bins), sum(part.before for part in bins)
    scale = 1 + len(bins) * SMOOTHING
    figure = 0.0
    for part in bins:
        share_now = (part.now / total_now + SMOOTHING) / scale
        share_before = (part.before / total_before + SMOOTHING) / scale
        figure += (share_now - share_before) * math.log(share_now / share_before)
    return figure


def band(figure: float) -> Band:
    return "stable" if figure < MODERATE else "moderate" if figure <= MAJOR else "major"


def too_few(bins: Sequence[CommonBin]) -> str | None:
    """Why the populations are too small for a PSI; None if they are large enough."""
    now, before = sum(part.now for part in bins), sum(part.before for part in bins)
    if min(now, before) < FEWEST:
        return f"too few users: {now:,} now and {before:,} before; each needs at least {FEWEST}"
    noise = (len([part for part in bins if part.now or part.before]) - 1) * (1 / now + 1 / before)
    if noise > MOST_NOISE:
        return f"too few users for so many bins: chance alone gives a PSI of about {noise:.2f}"
    return None


def _texts(now: Counter[Scalar], before: Counter[Scalar]) -> list[CommonBin]:
    names = sorted(
        (text for text in now.keys() | before.keys() if isinstance(text, str)),
        key=lambda text: (-now[text] - before[text], text),
    )
    shown, rest = names[:MAX_CATEGORIES], names[MAX_CATEGORIES:]
    bins = [CommonBin(now[text], before[text], "value", text) for text in shown]
    if rest:
        bins.append(CommonBin(sum(now[text] for text in rest), sum(before[text] for text in rest), "other"))
    return bins


def _numbers(dtype: Dtype, now: Counter[float], before: Counter[float]) -> list[CommonBin]:
    pooled = now + before
    if not pooled:
        return []
    if len(pooled) == 1 or (dtype == "int" and len(pooled) <= MAX_CATEGORIES):
        return _categories(pooled, now, before)
    edges = _edges(dtype, pooled)
    bins = [CommonBin(0, 0, start=start, end=end) for start, end in pairwise(edges)]
    for number in pooled:
        part = bins[min(max(bisect_right(edges, number) - 1, 0), len(bins) - 1)]
        part.now += now[number]
        part.before += before[number]
    if min(pooled) < edges[0]:
        bins[0].start = None
    if max(pooled) > edges[-1] or (dtype == "int" and max(pooled) == edges[-1]):
        bins[-1].end = None
    return bins


def _categories(pooled: Counter[float], now: Counter[float], before: Counter[float]) -> list[CommonBin]:
    """One bin for each value. If all values are whole numbers and their range is small, also an empty bin for each
    whole number between them."""
    low, high = min(pooled), max(pooled)
    wide = high - low >= MAX_CATEGORIES or not (low.is_integer() and high.is_integer())
    values = sorted(pooled) if wide else [low + step for step in range(int(high - low) + 1)]
    return [
        CommonBin(now[value], before[value], "value", int(value) if value.is_integer() else value) for value in values
    ]


def _edges(dtype: Dtype, pooled: Counter[float]) -> list[float]:
    """Edges of equally wide bins, at round numbers, from the 1st to the 99th percentile of both populations."""
    low, high = quantiles(pooled.elements(), (_TAIL, 1 - _TAIL))
    if low is None or high is None or low == high:
        low, high = min(pooled), max(pooled)
    raw = (high - low) / BINS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * magnitude for nice in _NICE if nice * magnitude >= raw * (1 - 1e-9))
    if dtype == "int":
        step = max(1.0, math.ceil(step))
    start = math.floor(low / step)
    count = max(1, math.ceil(high / step - 1e-9) - start)
    if dtype == "int" and (start + count) * step <= high:
        count += 1  # a bin of whole numbers never holds its upper edge
    digits = max(0, 3 - math.floor(math.log10(step)))
    return [round((start + place) * step, digits) for place in range(count + 1)]
