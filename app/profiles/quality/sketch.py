"""Sketches: how values are distributed, in memory that does not grow with the number of users.

Up to `EXACT` different numbers are counted each by itself. With more, they are counted in buckets whose edges grow by
`GAMMA`, so that a number is known to within `ERROR` of itself, 1 %; what is closer to 0 than `TINY` counts as 0, and
what is further away than `HUGE` as `HUGE`. So there are never more than some 4,200 counts. Of texts, the first `EXACT`
different ones are counted, and the rest together. Counts, nulls, the least and the greatest number are exact always.

The scheme of buckets is that of DDSketch (C. Masson, J. Rim, H. Lee: DDSketch, a fast and fully-mergeable quantile
sketch with relative-error guarantees, VLDB 2019).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from app.features.registry import Scalar

EXACT = 512
GAMMA = 1.02
ERROR = (GAMMA - 1) / (GAMMA + 1)
TINY = 1e-6
HUGE = 1e12
_LOG_GAMMA = math.log(GAMMA)
_MOST = math.ceil(math.log(HUGE / TINY) / _LOG_GAMMA)


class Sketch(msgspec.Struct):
    """Values counted. It can be stored between two values, as JSON."""

    nulls: int = 0
    known: int = 0
    low: float | None = None
    high: float | None = None
    # Number and count while they are few; then empty for good, and `buckets` is not None.
    numbers: dict[float, int] = {}
    buckets: dict[int, int] | None = None
    texts: dict[str, int] = {}
    other_texts: int = 0

    def add(self, value: Scalar) -> None:
        """Count a value."""
        if value is None:
            self.nulls += 1
            return
        self.known += 1
        if isinstance(value, str):
            self._add_text(value)
            return
        number = float(value)
        self.low = number if self.low is None else min(self.low, number)
        self.high = number if self.high is None else max(self.high, number)
        number = 0.0 if abs(number) <= TINY else min(max(number, -HUGE), HUGE)
        if self.buckets is not None:
            bucket = _bucket(number)
            self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
            return
        self.numbers[number] = self.numbers.get(number, 0) + 1
        if len(self.numbers) > EXACT:
            self.buckets = self._coarse()
            self.numbers.clear()

    @property
    def total(self) -> int:
        """How many values, nulls among them."""
        return self.known + self.nulls

    @property
    def exact(self) -> bool:
        """Whether each different number is counted by itself."""
        return self.buckets is None

    def counts(self, *, exact: bool = True) -> list[tuple[float, int]]:
        """Numbers, ascending, with their counts; a bucket stands for the number in its middle.

        `exact` False: as if in buckets, to be set beside a sketch that is.
        """
        if exact and self.buckets is None:
            return sorted(self.numbers.items())
        buckets = self.buckets if self.buckets is not None else self._coarse()
        return [(_middle(bucket), count) for bucket, count in sorted(buckets.items())]

    def quantiles(self, shares: Sequence[float]) -> list[float | None]:
        """Numbers of the nearest rank, None each where there is none; the greatest for a share of 1."""
        if self.low is None or self.high is None:
            return [None for _ in shares]
        ranked = [number for number, _ in self.counts()]
        reached = list(accumulate(count for _, count in self.counts()))
        places = [min(reached[-1] - 1, int(share * reached[-1])) for share in shares]
        return [
            self.high
            if place == reached[-1] - 1
            else min(max(ranked[bisect_right(reached, place)], self.low), self.high)
            for place in places
        ]

    def _coarse(self) -> dict[int, int]:
        buckets: dict[int, int] = {}
        for number, count in self.numbers.items():
            bucket = _bucket(number)
            buckets[bucket] = buckets.get(bucket, 0) + count
        return buckets

    def _add_text(self, value: str) -> None:
        if value in self.texts or len(self.texts) < EXACT:
            self.texts[value] = self.texts.get(value, 0) + 1
        else:
            self.other_texts += 1


def _bucket(number: float) -> int:
    """0 around zero, else how many times `GAMMA` the number is away from it, with the number's sign."""
    size = abs(number)
    if size <= TINY:
        return 0
    place = min(_MOST, max(1, math.ceil(math.log(size / TINY) / _LOG_GAMMA)))
    return place if number > 0 else -place


def _middle(bucket: int) -> float:
    """The number from which everything in the bucket is equally far, in proportion."""
    if bucket == 0:
        return 0.0
    size = TINY * GAMMA ** abs(bucket) * 2 / (1 + GAMMA)
    return size if bucket > 0 else -size
