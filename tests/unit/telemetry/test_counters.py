"""The fast counters export what prometheus-client's metrics export for the same observations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from app.telemetry import FAST
from app.telemetry.counters import FastCounter, HistogramCollector

TEXT, LABELS = "Seconds.", ("route", "status")
observed = st.one_of(st.sampled_from(FAST), st.floats(0, 100, allow_nan=False))


def said(registry: CollectorRegistry) -> list[str]:
    """The exposition, without the moments of creation, which ours leave out."""
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


@given(st.lists(st.integers(0, 1_000_000)))
def test_counter_agrees_with_prometheus(counted: list[int]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = FastCounter(ours, "things_total", TEXT)
    counter = Counter("profiles_things_total", TEXT, registry=theirs)
    for by in counted:
        tally.inc(by)
        counter.inc(by)
    assert said(ours) == said(theirs)


@given(st.lists(st.tuples(st.sampled_from(["/a", "/b"]), st.sampled_from([200, 404]), observed)))
def test_histogram_agrees_with_prometheus(observations: list[tuple[str, int, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = HistogramCollector(ours, "seconds", TEXT, FAST, LABELS)
    histogram = Histogram("profiles_seconds", TEXT, LABELS, buckets=FAST, registry=theirs)
    for route, status, value in observations:
        tally.labels(route, status).observe(value)
        histogram.labels(route, status).observe(value)
    assert said(ours) == said(theirs)


def test_histogram_refuses_wrong_labels() -> None:
    with pytest.raises(ValueError, match="route, status"):
        HistogramCollector(CollectorRegistry(), "seconds", TEXT, FAST, LABELS).labels("/a")
