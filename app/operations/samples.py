"""What a process counted within some seconds, as a sample, and samples of many processes summed.

A sample is the difference between two readings of a process's `Metrics`, so a restart, where counters begin at zero,
does no harm. Sums over processes are honest: counts and buckets add up; of gauges, which are the whole service's and
not a process's, the newest counts. Time without a sample is unknown, never zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import prometheus_client

from app.operations import buckets
from app.operations.states import ComponentView
from app.telemetry import Metrics

Role = Literal["api", "worker"]
# Routes of people and probes: an admin's page of many seconds is not what the recommender waits for.
LEFT_OUT = ("/admin", "/schema", "/healthz", "/readyz", "/metrics")
UNMATCHED = ("unmatched", "/")
# What waits for a machine of somebody else's says nothing of this service's own speed.
WAITS_ELSEWHERE = ("/generate",)


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
    """What one process counted in the `seconds` before `at_ms`, and what it saw then of what it depends on.

    `registry` is the fingerprint of the registry that it serves.
    """

    at_ms: int
    process: str
    role: Role
    seconds: float
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    latency: dict[str, int] = msgspec.field(default_factory=dict)
    lag: dict[str, int] = msgspec.field(default_factory=dict)
    gauges: Gauges = Gauges()
    looks: dict[str, ComponentView] = msgspec.field(default_factory=dict)
    stopped: bool = False
    registry: str = ""

    @property
    def told(self) -> str:
        """The process, as messages name it."""
        return f"{'worker' if self.role == 'worker' else 'API process'} {self.process}"


class CounterSnapshot(NamedTuple):
    """A process's counters at a moment; latency is of the recommender's and the producers' routes."""

    counts: Counter[str]
    latency: Counter[str]
    lag: Counter[str]

    def since(self, before: CounterSnapshot) -> CounterSnapshot:
        """What was counted since an earlier reading; only what is not zero."""
        return CounterSnapshot(self.counts - before.counts, self.latency - before.latency, self.lag - before.lag)


def read(metrics: Metrics) -> CounterSnapshot:
    """Read the counters of this process; some tens of microseconds."""
    counts: Counter[str] = Counter(
        hits=metrics.cache_hits.total, near_hits=metrics.near_hits.total, misses=metrics.cache_misses.total
    )
    latency: Counter[str] = Counter()
    for (_, route, status), spread in metrics.request_seconds.spreads():
        if route.startswith(LEFT_OUT) or route in UNMATCHED:
            continue
        counts[f"requests_{status[0]}xx"] += sum(spread.counts)
        if route not in WAITS_ELSEWHERE:
            latency += buckets.of_spread(spread)
    for prefix, counter, label in (
        ("fills", metrics.fills, "outcome"),
        ("degraded_reads", metrics.degraded_reads, ""),
        ("events", metrics.events, "outcome"),
        ("invalidations", metrics.invalidations, "outcome"),
        ("feature_errors", metrics.computation_errors, ""),
        ("stale_dropped", metrics.stale_dropped, ""),
        ("checks", metrics.consistency_checks, "outcome"),
        ("untrue", metrics.consistency_violations, ""),
        ("publish_failures", metrics.publish_failures, ""),
        ("shed", metrics.shed, ""),
        ("generations", metrics.generations, "outcome"),
    ):
        _add(counts, prefix, counter, label)
    return CounterSnapshot(counts, latency, buckets.of_histogram(metrics.invalidation_lag))


def _add(counts: Counter[str], prefix: str, counter: prometheus_client.Counter, label: str) -> None:
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                counts[f"{prefix}_{sample.labels[label]}" if label else prefix] += int(sample.value)


@dataclass(slots=True)
class Sum:
    """Samples of many processes within one stretch of time.

    `covered_s` is how much of it any process watched, `served_s` how much some API process did: what a rate is over.
    """

    counts: Counter[str] = field(default_factory=Counter)
    latency: Counter[str] = field(default_factory=Counter)
    lag: Counter[str] = field(default_factory=Counter)
    newest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    covered_s: float = 0.0
    served_s: float = 0.0


def summed(samples: Iterable[Sample]) -> Sum:
    """Add samples up; they come in the order of time."""
    total = Sum()
    spans: list[tuple[float, float]] = []
    served: list[tuple[float, float]] = []
    for sample in samples:
        _count(total, sample.counts, sample.latency, sample.lag)
        gauges = msgspec.structs.asdict(sample.gauges)
        _note(total, gauges, gauges)
        span = (sample.at_ms / 1000 - sample.seconds, sample.at_ms / 1000)
        spans.append(span)
        if sample.role == "api":
            served.append(span)
    total.covered_s, total.served_s = _union(spans), _union(served)
    return total


def joined(parts: Iterable[Sum]) -> Sum:
    """Sums of one stretch of time after the other, as one."""
    total = Sum()
    for part in parts:
        _count(total, part.counts, part.latency, part.lag)
        _note(total, part.newest, part.highest)
        total.covered_s += part.covered_s
        total.served_s += part.served_s
    return total


def _count(total: Sum, counts: Mapping[str, int], latency: Mapping[str, int], lag: Mapping[str, int]) -> None:
    for into, more in ((total.counts, counts), (total.latency, latency), (total.lag, lag)):
        for name, count in more.items():
            into[name] += count


def _note(total: Sum, newest: Mapping[str, float | None], highest: Mapping[str, float | None]) -> None:
    for name, value in newest.items():
        if value is not None:
            total.newest[name] = value
    for name, value in highest.items():
        if value is not None:
            total.highest[name] = max(value, total.highest.get(name, value))


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def in_slots(samples: Iterable[Sample], starts_ms: Sequence[int], slot_ms: int) -> list[Sum | None]:
    """A sum for each slot of time; None where nobody took a sample in it."""
    slots: Mapping[int, list[Sample]] = {start: [] for start in starts_ms}
    for sample in samples:
        found = slots.get(sample.at_ms - sample.at_ms % slot_ms)
        if found is not None:
            found.append(sample)
    return [summed(found) if (found := slots[start]) else None for start in starts_ms]
