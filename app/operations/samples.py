"""What a process counted within some seconds, as a sample, and samples of many processes summed.

A sample is the difference between two readings of a process's `Metrics`, so a restart, which sets counters to zero,
does no harm. Counts and the buckets of histograms add up over processes. A gauge is of the whole service, so its newest
value counts. Time without a sample is unknown, never zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from app.operations.states import ComponentView
from app.telemetry import Metrics

Role = Literal["api", "worker"]
# Routes of people and probes: an admin's page of many seconds is not what the recommender waits for.
LEFT_OUT = ("/admin", "/schema", "/healthz", "/readyz", "/metrics")
UNMATCHED = ("unmatched", "/")
# The time of a request that waits for a language model says nothing of this service's own speed.
WAITS_ELSEWHERE = "/generate"
# What is read of the metrics: the name of the count, and the label whose value is appended to it.
COUNTERS = {
    "profiles_cache_hits_total": ("hits", ""),
    "profiles_near_hits_total": ("near_hits", ""),
    "profiles_cache_misses_total": ("misses", ""),
    "profiles_cache_fills_total": ("fills", "outcome"),
    "profiles_degraded_reads_total": ("degraded_reads", ""),
    "profiles_events_total": ("events", "outcome"),
    "profiles_invalidations_total": ("invalidations", "outcome"),
    "profiles_computation_errors_total": ("feature_errors", ""),
    "profiles_stale_values_dropped_total": ("stale_dropped", ""),
    "profiles_consistency_checks_total": ("checks", "outcome"),
    "profiles_consistency_violations_total": ("untrue", ""),
    "profiles_publish_failures_total": ("publish_failures", ""),
    "profiles_requests_shed_total": ("shed", ""),
    "profiles_generations_total": ("generations", "outcome"),
}
REQUESTS = "profiles_http_request_duration_seconds_count"
BUCKETS = {
    "profiles_http_request_duration_seconds_bucket": "latency",
    "profiles_invalidation_lag_seconds_bucket": "lag",
}


class Process(NamedTuple):
    """A process: its role, its name (random, new with every start), and the fingerprint of its registry."""

    role: Role
    name: str
    registry: str


class Gauges(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Work not done, of the whole service; None where it could not be asked."""

    queue_depth: int | None = None
    outbox: int | None = None
    outbox_age_s: float | None = None
    dead_letters: int | None = None
    owed: int | None = None
    events_ahead: int | None = None
    unreadable: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one process counted in the `seconds` before `at_ms`, and how its dependencies looked to it then.

    A bucket is counted by its upper bound as Prometheus writes it (`latency_0.005`, `lag_+Inf`), so that samples of two
    releases with other bounds can be added. `registry` is the fingerprint of the registry that the process serves.
    """

    at_ms: int
    process: str
    role: Role
    seconds: float
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    gauges: Gauges = Gauges()
    looks: dict[str, ComponentView] = msgspec.field(default_factory=dict)
    stopped: bool = False
    registry: str = ""

    @property
    def told(self) -> str:
        """The process, as messages name it."""
        return f"{'worker' if self.role == 'worker' else 'API process'} {self.process}"


def read(metrics: Metrics) -> Counter[str]:
    """What this process has counted since its start; latency is of the recommender's and the producers' routes."""
    found: Counter[str] = Counter()
    below = 0.0
    for name, labels, value, *_ in (sample for family in metrics.collectors.collect() for sample in family.samples):
        route = labels.get("route", "")
        asked = not route.startswith(LEFT_OUT) and route not in UNMATCHED
        if name in COUNTERS:
            counted, label = COUNTERS[name]
            found[f"{counted}_{labels[label]}" if label else counted] += round(value)
        elif name == REQUESTS and asked:
            found[f"requests_{labels['status'][0]}xx"] += round(value)
        elif name in BUCKETS:  # of each set of labels in order, each with all that are below it
            bound, count = labels["le"], round(value - below)
            below = 0.0 if bound == "+Inf" else value
            if asked and route != WAITS_ELSEWHERE:
                found[f"{BUCKETS[name]}_{bound}"] += count
    return found


@dataclass(slots=True)
class Sum:
    """Samples of many processes within one stretch of time.

    `covered_s` is how much of it any process watched, `served_s` how much some API process did: what a rate is over.
    """

    counts: Counter[str] = field(default_factory=Counter)
    newest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    covered_s: float = 0.0
    served_s: float = 0.0


def summed(samples: Iterable[Sample]) -> Sum:
    """Add samples up; they come in the order of time."""
    total = Sum()
    spans: dict[Role, list[tuple[float, float]]] = {"api": [], "worker": []}
    for sample in samples:
        total.counts.update(sample.counts)
        for name, value in msgspec.structs.asdict(sample.gauges).items():
            if value is not None:
                total.newest[name] = value
                total.highest[name] = max(value, total.highest.get(name, value))
        spans[sample.role].append((sample.at_ms / 1000 - sample.seconds, sample.at_ms / 1000))
    total.covered_s, total.served_s = _union(spans["api"] + spans["worker"]), _union(spans["api"])
    return total


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
