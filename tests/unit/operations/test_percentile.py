"""Percentiles of histograms against the exact ones."""

from bisect import bisect_left
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.operations.figures import percentile
from app.operations.samples import read
from app.telemetry import FAST, Metrics

SECONDS = st.floats(0.00001, 20)


def buckets_of(values: list[float]) -> Counter[str]:
    metrics = Metrics()
    for value in values:
        metrics.invalidation_lag.labels("http").observe(value)
    return Counter({name.removeprefix("lag_"): count for name, count in (+read(metrics)).items()})


@given(values=st.lists(SECONDS, min_size=1, max_size=40), share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentile_is_in_the_bucket_of_the_exact_one(values: list[float], share: float) -> None:
    found = percentile(buckets_of(values), share)
    assert found is not None
    rank = share * len(values)
    true = sorted(values)[max(0, -int(-rank // 1) - 1)]
    index = bisect_left(FAST, true)
    if index == len(FAST):
        assert found == FAST[-1]
    else:
        assert (FAST[index - 1] if index else 0.0) <= found <= FAST[index]


@given(values=st.lists(st.lists(SECONDS, max_size=10), max_size=4), share=st.sampled_from([0.5, 0.99]))
def test_percentile_is_the_same_over_several_processes(values: list[list[float]], share: float) -> None:
    added: Counter[str] = Counter()
    for part in values:
        added.update(buckets_of(part))
    assert percentile(added, share) == percentile(buckets_of([value for part in values for value in part]), share)


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({"0.5": 0}, 0.5, None),
        ({"0.0001": 2}, 0.5, 0.00005),  # half of the first bucket, which begins at nothing
        ({"0.5": 4}, 0.5, 0.375),  # from 0.25, the bound below, though nothing was observed there
        ({"0.001": 99, "10.0": 1}, 0.99, 0.001),
        ({"0.001": 1, "+Inf": 1}, 1.0, 10.0),
        ({"+Inf": 3}, 0.5, 10.0),
        ({"0.3": 2}, 1.0, 0.3),  # a bound of another release
    ],
)
def test_percentile_is_interpolated(buckets: dict[str, int], share: float, expected: float | None) -> None:
    assert percentile(buckets, share) == (pytest.approx(expected) if expected is not None else None)
