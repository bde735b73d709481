"""Counts of observations by bucket, kept sparse and added over processes, and percentiles from them.

A bucket is named by its upper bound as Prometheus writes it (`0.005`, `+Inf`), not by its number, so that samples of
two releases with other bounds can still be added. Invariant: a percentile lies in the bucket that holds the true one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

from prometheus_client import Histogram
from prometheus_client.utils import floatToGoString

from app.telemetry import FAST
from app.telemetry.counters import FastHistogram

OVER = "+Inf"
MARKS = (*map(floatToGoString, FAST), OVER)


def of_spread(spread: FastHistogram) -> Counter[str]:
    """The buckets of one of our own histograms; its bounds are `FAST`."""
    return Counter({mark: count for mark, count in zip(MARKS, spread.counts, strict=True) if count})


def of_histogram(histogram: Histogram) -> Counter[str]:
    """The buckets of prometheus-client's histogram, summed over its labels."""
    found: Counter[str] = Counter()
    for family in histogram.collect():
        below = 0.0
        for sample in family.samples:  # of each set of labels the buckets, counted from below, in order
            if not sample.name.endswith("_bucket"):
                below = 0.0
                continue
            if sample.value > below:
                found[sample.labels["le"]] += round(sample.value - below)
            below = 0.0 if sample.labels["le"] == OVER else sample.value
    return found


def percentile(buckets: Mapping[str, int], share: float) -> float | None:
    """Seconds that `share` of the observations took at most, None where there are none.

    Within a bucket observations are taken to lie evenly. Above the last bound nothing is known but the bound.
    """
    rank = share * sum(buckets.values())
    if not rank:
        return None
    bounded = sorted((float(mark), count) for mark, count in buckets.items() if mark != OVER and count)
    below = 0
    for upper, count in bounded:
        if below + count >= rank:
            lower = _lower(upper)
            return lower + (upper - lower) * (rank - below) / count
        below += count
    return max(FAST[-1], bounded[-1][0] if bounded else 0.0)


def _lower(upper: float) -> float:
    index = bisect_left(FAST, upper)
    return FAST[index - 1] if index else 0.0
