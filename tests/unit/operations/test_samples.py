"""Samples: differences of readings, sums over processes, slots of time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.operations.samples import Gauges, read, sum_samples
from app.telemetry import Metrics
from tests.support.clock import NOW_MS
from tests.support.samples import sample


def counted(metrics: Metrics) -> Metrics:
    metrics.cache_hits.inc(5)
    metrics.near_hits.inc(2)
    metrics.cache_misses.inc(3)
    metrics.fills.labels("stored").inc(3)
    metrics.fills.labels("refused").inc()
    metrics.degraded_reads.labels("owed").inc()
    metrics.degraded_reads.labels("unavailable").inc(2)
    metrics.events.labels("http", "accepted").inc(4)
    metrics.events.labels("queue", "accepted").inc()
    metrics.invalidations.labels("dropped").inc(2)
    metrics.computation_errors.labels("tip_volume_30d").inc()
    metrics.stale_dropped.inc()
    metrics.consistency_checks.labels("1s", "consistent").inc(4)
    metrics.consistency_checks.labels("5min", "consistent").inc()
    metrics.consistency_violations.labels("a", "stale").inc(2)
    metrics.consistency_violations.labels("b", "unexplained").inc()
    metrics.publish_failures.inc()
    metrics.shed.labels("reads").inc()
    metrics.shed.labels("events").inc(2)
    metrics.request_seconds.labels("GET", "/profiles/{user_id}", 200).observe(0.0004)
    metrics.request_seconds.labels("POST", "/events", 422).observe(0.004)
    metrics.request_seconds.labels("POST", "/events", 503).observe(0.2)
    metrics.invalidation_lag.labels("http").observe(0.02)
    return metrics


ONCE = {
    "hits": 5,
    "misses": 3,
    "fills_stored": 3,
    "fills_refused": 1,
    "degraded_reads": 3,
    "events_accepted": 5,
    "feature_errors": 1,
    "stale_dropped": 1,
    "checks_consistent": 5,
    "untrue": 3,
    "shed": 3,
    "requests_2xx": 1,
    "requests_4xx": 1,
    "requests_5xx": 1,
    "latency_0.0005": 1,
    "latency_0.005": 1,
    "latency_0.25": 1,
    "lag_0.025": 1,
}


def test_reading_has_every_counter_that_figures_use() -> None:
    assert +read(counted(Metrics())) == ONCE


def test_difference_of_readings_has_the_counts_between() -> None:
    metrics = counted(Metrics())
    before = read(metrics)
    assert read(metrics) - before == {}
    assert read(counted(metrics)) - before == ONCE


@given(values=st.lists(st.floats(0.00001, 20), max_size=30))
def test_both_kinds_of_histogram_give_the_same_buckets(values: list[float]) -> None:
    metrics = Metrics()
    for number, value in enumerate(values):
        metrics.invalidation_lag.labels("http" if number % 2 else "queue").observe(value)
        metrics.request_seconds.labels("GET", "/profiles", 500 if number % 3 else 200).observe(value)
    found = +read(metrics)
    lag = {name.removeprefix("lag_"): count for name, count in found.items() if name.startswith("lag_")}
    latency = {name.removeprefix("latency_"): count for name, count in found.items() if name.startswith("latency_")}
    assert lag == latency
    assert sum(lag.values()) == len(values)


@pytest.mark.parametrize(
    "route",
    ["/admin", "/admin/users/{user_id:str}", "/schema/assets/{file_path:path}", "/healthz", "/readyz", "/metrics", "/"],
)
def test_pages_and_probes_do_not_count_as_requests(route: str) -> None:
    metrics = Metrics()
    metrics.request_seconds.labels("GET", route, 200).observe(9)
    metrics.request_seconds.labels("GET", "unmatched", 404).observe(9)
    assert not +read(metrics)


@pytest.mark.parametrize(
    ("method", "route"), [("POST", "/generate"), ("POST", "/profiles/history"), ("GET", "/decisions")]
)
def test_latency_of_slow_routes_is_not_counted(method: str, route: str) -> None:
    metrics = Metrics()
    metrics.request_seconds.labels(method, route, 200).observe(7)
    assert +read(metrics) == {"requests_2xx": 1}


def test_sum_adds_counts_and_takes_the_newest_gauge() -> None:
    found = sum_samples(
        [
            sample(at_ms=NOW_MS - 1_000, counts={"hits": 3, "misses": 1}, gauges=Gauges(queue_depth=7, owed=2)),
            sample(at_ms=NOW_MS, process="two", counts={"hits": 2}, gauges=Gauges(queue_depth=1)),
        ]
    )
    assert found.counts == {"hits": 5, "misses": 1}
    assert found.newest == {"queue_depth": 1, "owed": 2}
    assert found.highest == {"queue_depth": 7, "owed": 2}


def test_time_counts_once_when_processes_overlap() -> None:
    twice = [sample(), sample(process="two"), sample(process="three", role="worker", at_ms=NOW_MS + 5_000)]
    assert sum_samples(twice).served_s == pytest.approx(10)
    assert sum_samples(twice).covered_s == pytest.approx(15)
    # A process that was replaced: its time and its successor's follow each other.
    replaced = [sample(seconds=4.0, at_ms=NOW_MS - 6_000), sample(process="new", seconds=5.0)]
    assert sum_samples(replaced).served_s == pytest.approx(9)


@given(spans=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_time_covered_is_the_union_of_what_the_samples_cover(spans: list[tuple[int, int]]) -> None:
    samples = [sample(at_ms=end * 1000, seconds=float(length)) for end, length in spans]
    seconds = {second for end, length in spans for second in range(end - length, end)}
    assert sum_samples(samples).covered_s == pytest.approx(len(seconds))
