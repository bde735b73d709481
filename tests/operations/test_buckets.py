"""Buckets: read from both kinds of histogram, added, and percentiles that lie where the true ones do."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.operations.buckets import MARKS, OVER, of_histogram, of_spread, percentile
from app.telemetry import FAST, Metrics
from app.telemetry.counters import FastHistogram

SECONDS = st.floats(0.00001, 20)


def spread_of(values: list[float]) -> Counter[str]:
    """The buckets of observations."""
    spread = FastHistogram(FAST)
    for value in values:
        spread.observe(value)
    return of_spread(spread)


@given(values=st.lists(SECONDS, max_size=30))
def test_both_kinds_of_histogram_give_the_same_buckets(values: list[float]) -> None:
    metrics = Metrics()
    for number, value in enumerate(values):
        metrics.invalidation_lag.labels("http" if number % 2 else "queue").observe(value)
    assert of_histogram(metrics.invalidation_lag) == spread_of(values)
    assert sum(spread_of(values).values()) == len(values)


@given(values=st.lists(SECONDS, min_size=1, max_size=40), share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    found = percentile(spread_of(values), share)
    assert found is not None
    rank = share * len(values)
    true = sorted(values)[max(0, -int(-rank // 1) - 1)]
    index = bisect_left(FAST, true)
    if index == len(FAST):
        assert found == FAST[-1]
    else:
        assert (FAST[index - 1] if index else 0.0) <= found <= FAST[index]


@given(values=st.lists(st.lists(SECONDS, max_size=10), max_size=4), share=st.sampled_from([0.5, 0.99]))
def test_percentile_is_the_same_when_the_observations_were_shared_out_among_processes(
    values: list[list[float]], share: float
) -> None:
    added: Counter[str] = Counter()
    for part in values:
        added.update(spread_of(part))
    assert percentile(added, share) == percentile(spread_of([value for part in values for value in part]), share)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({"0.5": 0}, 0.5, None),
        ({"0.0001": 2}, 0.5, 0.00005),  # half of the first bucket, which begins at nothing
        ({"0.5": 4}, 0.5, 0.375),  # from 0.25, the bound below, though nothing was observed there
        ({"0.001": 99, "10.0": 1}, 0.99, 0.001),
        ({"0.001": 1, OVER: 1}, 1.0, 10.0),
        ({OVER: 3}, 0.5, 10.0),
        ({"0.3": 2}, 1.0, 0.3),  # a bound of another release
    ],
)
def test_percentile_is_interpolated(buckets: dict[str, int], share: float, expected: float | None) -> None:
    assert percentile(buckets, share) == (pytest.approx(expected) if expected is not None else None)


def test_marks_are_those_of_the_exposition() -> None:
    text = Metrics()
    text.invalidation_lag.labels("http").observe(1)
    exposed = text.exposition().decode()
    assert all(f'le="{mark}"' in exposed for mark in MARKS)
