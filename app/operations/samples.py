"""Samples of a process's metrics over some seconds: how they are taken, stored, and summed over processes.

A sample is the difference between two readings of a process's `Metrics`, so a restart, which resets the counters, loses
nothing. A gauge describes the whole service. If no sample covers a time, its values are unknown, not zero.

Invariants: counts that could not be stored are part of the next sample, and nothing is counted twice; a component's
state becomes worse only after a check has failed twice, a second apart.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

import msgspec

from app.errors import Unavailable
from app.features.clock import Clock
from app.operations.component_states import ComponentStatus, ComponentView, ReadinessCheck, component_views
from app.telemetry import Metrics

Role = Literal["api", "worker"]
EVERY_S, ASK_AGAIN_S, LAST_S = 10.0, 1.0, 0.3
SUMMARY_MS = 30 * 60_000
# Pages and probes do not count as requests: an admin's page may take seconds, and no recommender waits for it.
UNCOUNTED_ROUTES = ("/admin", "/schema", "/healthz", "/readyz", "/metrics", "unmatched")
# Slow by design: the first waits for a language model, the others export up to thousands of rows.
UNTIMED_ROUTES = ("/generate", "/profiles/history", "/decisions")
# The name of the count of each metric. If the metric has the label `outcome`, its value is appended to that name.
COUNTERS = {
    "profiles_cache_hits_total": "hits",
    "profiles_cache_misses_total": "misses",
    "profiles_cache_fills_total": "fills",
    "profiles_degraded_reads_total": "degraded_reads",
    "profiles_events_total": "events",
    "profiles_computation_errors_total": "feature_errors",
    "profiles_stale_values_dropped_total": "stale_dropped",
    "profiles_consistency_checks_total": "checks",
    "profiles_consistency_violations_total": "untrue",
    "profiles_decision_checks_total": "decision_checks",
    "profiles_requests_shed_total": "shed",
    "profiles_generations_total": "generations",
}
REQUESTS = "profiles_http_request_duration_seconds_count"
BUCKETS = {
    "profiles_http_request_duration_seconds_bucket": "latency",
    "profiles_invalidation_lag_seconds_bucket": "lag",
}


class Gauges(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Gauges of the whole service; None if a value could not be read. `outbox`: unconsumed events. `owed`: deletions of
    cache keys that are still to be made. `unreadable`: users whose sufficient statistics are damaged."""

    queue_depth: int | None = None
    outbox: int | None = None
    outbox_age_s: float | None = None
    dead_letters: int | None = None
    owed: int | None = None
    events_ahead: int | None = None
    unreadable: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The metrics that one process counted in the `seconds` before `at_ms`, and the component states it saw then.

    `counts` also contains histogram buckets, named by their upper bound in seconds as Prometheus writes it
    (`latency_0.005`, `lag_+Inf`), so that samples of releases with different bounds can be added. `stopped`: this is
    the process's last sample. `registry` is the fingerprint of the feature registry that the process serves.
    """

    at_ms: int
    process: str
    role: Role
    seconds: float
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    gauges: Gauges = Gauges()
    components: dict[str, ComponentView] = msgspec.field(default_factory=dict, name="looks")
    stopped: bool = False
    registry: str = ""

    @property
    def process_label(self) -> str:
        """The role and the name of the process for messages, such as `worker 3f9a01bc`."""
        return f"{'worker' if self.role == 'worker' else 'API process'} {self.process}"


class Record(NamedTuple):
    """Samples, oldest first, and the component statuses by name."""

    samples: list[Sample]
    statuses: dict[str, ComponentStatus]


class SampleStore(Protocol):
    """Stores samples, for at least an hour, and the component statuses. All methods raise `StoreUnavailable`."""

    async def keep(self, sample: Sample) -> None:
        """Store a sample, update the statuses from the recent samples of all processes, and delete old samples."""

    async def since(self, at_ms: int) -> Record:
        """Read the samples taken at or after `at_ms`, and the current statuses."""

    async def summaries(self, since_ms: int) -> list[Sample]:
        """Read the summaries of the periods that ended at or after `since_ms`, and the samples that no summary contains
        yet, oldest first. Summaries are deleted after 31 days."""


def read(metrics: Metrics) -> Counter[str]:
    """The counts and histogram buckets of this process since its start, by the names that samples use. Requests of
    admin pages, probes and unknown paths are left out, and `UNTIMED_ROUTES` are left out of the latency."""
    found: Counter[str] = Counter()
    below = 0.0
    for name, labels, value, *_ in (sample for family in metrics.collectors.collect() for sample in family.samples):
        route = labels.get("route", "")
        counted = route != "/" and not route.startswith(UNCOUNTED_ROUTES)
        if name in COUNTERS:
            outcome = f"_{labels['outcome']}" if "outcome" in labels else ""
            found[COUNTERS[name] + outcome] += round(value)
        elif name == REQUESTS and counted:
            found[f"requests_{labels['status'][0]}xx"] += round(value)
        elif name in BUCKETS:  # buckets are cumulative; those of one set of labels come in the order of their bounds
            bound, count = labels["le"], round(value - below)
            below = 0.0 if bound == "+Inf" else value
            if counted and route not in UNTIMED_ROUTES:
                found[f"{BUCKETS[name]}_{bound}"] += count
    return found


def summaries(samples: Iterable[Sample]) -> list[Sample]:
    """Add up samples, which must come oldest first, by role and by period of `SUMMARY_MS`. A summary has the highest
    value of each gauge, and the last millisecond of its period as its time."""
    parts: defaultdict[tuple[int, Role], list[Sample]] = defaultdict(list)
    for sample in samples:
        parts[sample.at_ms // SUMMARY_MS, sample.role].append(sample)
    found = []
    for (period, role), part in parts.items():
        sums, end_ms = sum_samples(part), (period + 1) * SUMMARY_MS - 1
        gauges = msgspec.convert(sums.highest, Gauges)
        found.append(
            Sample(at_ms=end_ms, process="", role=role, seconds=sums.covered_s, counts=sums.counts, gauges=gauges)
        )
    return found


class Totals(msgspec.Struct):
    """The sum of samples. `newest` and `highest` hold the newest and the highest value of each gauge, by name. The
    samples cover `covered_s` seconds. Those of API processes cover `served_s` seconds, the divisor of request rates."""

    counts: Counter[str] = msgspec.field(default_factory=Counter)
    newest: dict[str, float] = msgspec.field(default_factory=dict)
    highest: dict[str, float] = msgspec.field(default_factory=dict)
    covered_s: float = 0.0
    served_s: float = 0.0


def sum_samples(samples: Iterable[Sample]) -> Totals:
    """Add up samples of one or many processes. They must come oldest first."""
    totals = Totals()
    spans: dict[Role, list[tuple[float, float]]] = {"api": [], "worker": []}
    for sample in samples:
        totals.counts.update(sample.counts)
        for name, value in msgspec.structs.asdict(sample.gauges).items():
            if value is not None:
                totals.newest[name] = value
                totals.highest[name] = max(value, totals.highest.get(name, value))
        spans[sample.role].append((sample.at_ms / 1000 - sample.seconds, sample.at_ms / 1000))
    totals.covered_s, totals.served_s = _union_s(spans["api"] + spans["worker"]), _union_s(spans["api"])
    return totals


def _union_s(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans, which are pairs of start and end."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


class Sampler(msgspec.Struct, kw_only=True, eq=False):
    """Takes and stores samples of this process. `process` is its random name, new at every start."""

    role: Role
    process: str
    registry: str
    metrics: Metrics
    store: SampleStore
    ask_gauges: Callable[[], Awaitable[Gauges]]
    ask_readiness: Callable[[], Awaitable[Mapping[str, ReadinessCheck]]]
    clock: Clock
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    _failing: frozenset[str] = frozenset()
    _last: Counter[str] = msgspec.field(default_factory=Counter)
    _last_at: float = 0.0

    def __post_init__(self) -> None:
        self._last, self._last_at = read(self.metrics), self.clock.monotonic()

    async def sample(self) -> None:
        """Store a sample; called every `EVERY_S` seconds. If a readiness check has begun to fail since the last sample,
        all checks are repeated after `ASK_AGAIN_S` seconds. Raises `StoreUnavailable`."""
        checks = await self.ask_readiness()
        if any(not check.ok and name not in self._failing for name, check in checks.items()):
            await self.pause(ASK_AGAIN_S)
            checks = await self.ask_readiness()
        self._failing = frozenset(name for name, check in checks.items() if not check.ok)
        await self._keep(await self.ask_gauges(), checks)

    async def close(self) -> None:
        """Store a last sample, of counts only. After `LAST_S` seconds, and on a failure, give up."""
        with suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._keep(Gauges(), None)

    async def _keep(self, gauges: Gauges, checks: Mapping[str, ReadinessCheck] | None) -> None:
        before, before_at = self._last, self._last_at
        # Set before the write: if the write is cancelled, it may have been committed, and must not be counted twice.
        self._last, self._last_at = read(self.metrics), self.clock.monotonic()
        sample = Sample(
            at_ms=self.clock.now_ms(),
            process=self.process,
            role=self.role,
            seconds=round(self._last_at - before_at, 3),
            counts=self._last - before,
            gauges=gauges,
            components=component_views(checks) if checks is not None else {},
            stopped=checks is None,
            registry=self.registry,
        )
        try:
            await self.store.keep(sample)
        except Exception:
            self._last, self._last_at = before, before_at
            raise
