"""Computes the figures of the overview from the samples of all processes. A figure is None if nothing was observed."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from app.features.clock import HOUR_MS
from app.features.views import view
from app.operations.samples import Sample, Totals, sum_samples
from app.telemetry import FAST

Period = Literal["hour", "day", "month"]
# The length and the number of the slots of a period.
SLOTS: dict[Period, tuple[int, int]] = {"hour": (60_000, 60), "day": (HOUR_MS // 2, 48), "month": (12 * HOUR_MS, 60)}
SLOT_MS = SLOTS["hour"][0]
# One minute and half the interval between samples, so that six samples of each process are within it.
NOW_MS = 65_000
Unit = Literal["share", "per_s", "ms", "s", "count"]
HourIs = Literal["over all", "total", "highest"]


class Kind(NamedTuple):
    name: str
    title: str
    unit: Unit
    hour_is: HourIs
    explanation: str


class Figure(msgspec.Struct):
    """A number on the overview page. Each value is null if no sample covers its time."""

    title: str
    explanation: str
    unit: Unit
    now: Annotated[float | None, Meta(description="The value for the last minute, or the newest value of a gauge.")]
    hour: float | None
    hour_is: Annotated[HourIs, Meta(description="`hour` is computed over the hour, the total, or the highest value.")]
    series: Annotated[list[float | None], Meta(description="A value for each of `slots`; the last has not ended yet.")]


def percentile(buckets: Mapping[str, int], share: float) -> float | None:
    """Estimate the percentile `share`, 0 to 1, of a histogram, in seconds; None if there are no observations.

    `buckets` are counts by upper bound in seconds. Observations are assumed to lie evenly within a bucket, so the
    result is in the bucket of the true percentile. Above the last finite bound, the result is that bound.
    """
    rank = share * sum(buckets.values())
    if not rank:
        return None
    bounded = sorted((float(mark), count) for mark, count in buckets.items() if mark != "+Inf" and count)
    below = 0
    for upper, count in bounded:
        if below + count >= rank:
            index = bisect_left(FAST, upper)
            lower = FAST[index - 1] if index else 0.0
            return lower + (upper - lower) * (rank - below) / count
        below += count
    return max(FAST[-1], bounded[-1][0] if bounded else 0.0)


def _percentile_ms(histogram: str, share: float, totals: Totals) -> float | None:
    prefix = f"{histogram}_"
    buckets = {name[len(prefix) :]: count for name, count in totals.counts.items() if name.startswith(prefix)}
    seconds = percentile(buckets, share)
    return seconds * 1000 if seconds is not None else None


def _share(of: str, others: str, totals: Totals) -> float | None:
    both = totals.counts[of] + totals.counts[others]
    return totals.counts[of] / both if both else None


def _request_rate(totals: Totals) -> float | None:
    requests = sum(count for name, count in totals.counts.items() if name.startswith("requests_"))
    return requests / totals.served_s if totals.served_s else None


def _failed_requests(totals: Totals) -> float | None:
    # A shed request is a 503 as well, but it is no failure and has a figure of its own.
    return max(0, totals.counts["requests_5xx"] - totals.counts["shed"]) if totals.covered_s else None


# Any other figure is the count or the gauge of the same name.
COMPUTED: dict[str, Callable[[Totals], float | None]] = {
    "request_rate": _request_rate,
    "hit_ratio": partial(_share, "hits", "misses"),
    "latency_p50_ms": partial(_percentile_ms, "latency", 0.5),
    "latency_p99_ms": partial(_percentile_ms, "latency", 0.99),
    "failed_requests": _failed_requests,
    "lag_p50_ms": partial(_percentile_ms, "lag", 0.5),
    "lag_p99_ms": partial(_percentile_ms, "lag", 0.99),
    "consistent": partial(_share, "checks_consistent", "checks_violation"),
    "decisions_consistent": partial(_share, "decision_checks_consistent", "decision_checks_violation"),
}
KINDS = (
    Kind("request_rate", "Requests", "per_s", "over all", "Reads and events answered, over all processes."),
    Kind("hit_ratio", "Hit ratio", "share", "over all", "Share of the feature values that came from the cache."),
    Kind("latency_p50_ms", "Latency, median", "ms", "over all", "Half of the answers took at most this long."),
    Kind("latency_p99_ms", "Latency, p99", "ms", "over all", "99 of 100 answers took at most this long."),
    Kind("failed_requests", "Failed requests", "count", "total", "Answers with a 5xx status, except shed ones."),
    Kind("shed", "Shed requests", "count", "total", "Requests rejected with a 503 because of overload."),
    Kind(
        *("degraded_reads", "Degraded reads", "count", "total"),
        "Profiles computed because the cache did not answer or was not trusted. Correct, but slower.",
    ),
    Kind(
        *("fills_refused", "Fills refused", "count", "total"),
        "Values not cached because an event or another value came first. This is how stale values are avoided.",
    ),
    Kind(
        *("lag_p50_ms", "Lag, median", "ms", "over all"),
        "From the arrival of an event until its cache keys are deleted or owed: at most this long for half of them.",
    ),
    Kind(
        *("lag_p99_ms", "Lag, p99", "ms", "over all"),
        "From the arrival of an event until its cache keys are deleted or owed: at most this long for 99 of 100.",
    ),
    Kind(
        *("consistent", "Consistent", "share", "over all"),
        "Share of correct profiles among the cached ones that the audit checks 1 s, 1 min and 5 min after an event.",
    ),
    Kind(
        *("decisions_consistent", "Decisions consistent", "share", "over all"),
        "Share of correct profiles among those logged with decisions that the audit computes again.",
    ),
    Kind("queue_depth", "Queue depth", "count", "highest", "Jobs waiting for a worker."),
    Kind("outbox_age_s", "Outbox age", "s", "highest", "How long the oldest event has waited to be consumed."),
    Kind("outbox", "Outbox", "count", "highest", "Events that no worker has consumed yet."),
    Kind("dead_letters", "Dead letters", "count", "highest", "Events and jobs that could not be consumed."),
    Kind("unreadable", "Damaged states", "count", "highest", "Users whose learned state is damaged and was set aside."),
    Kind(
        *("events_ahead", "Events ahead of time", "count", "highest"),
        "Events more than five minutes in the future: a clock was wrong when they were stored.",
    ),
    Kind("owed", "Owed invalidations", "count", "highest", "Deletions that the cache has not executed yet."),
)


def compute_figures(
    samples: Sequence[Sample], of_period: Iterable[Sample], period: Period, now_ms: int
) -> tuple[dict[str, Figure], Mapping[str, int]]:
    """Compute the figures, and the sums of the counts of the last hour, each by name. The series of a figure has one
    value for each slot of `period`, computed from the samples or summaries `of_period`. For a gauge, this is the
    highest value in the slot. Samples must come oldest first."""
    latest = sum_samples(item for item in samples if item.at_ms > now_ms - NOW_MS)
    hour = sum_samples(item for item in samples if item.at_ms >= slot_starts(now_ms)[0])
    by_slot: defaultdict[int, list[Sample]] = defaultdict(list)
    for item in of_period:
        by_slot[item.at_ms - item.at_ms % SLOTS[period][0]].append(item)
    slots = [sum_samples(by_slot[start]) if start in by_slot else None for start in slot_starts(now_ms, period)]
    figures = {
        kind.name: view(
            Figure,
            kind,
            now=_value(kind, latest, newest=True),
            hour=_value(kind, hour),
            series=[_value(kind, slot) if slot is not None else None for slot in slots],
        )
        for kind in KINDS
    }
    return figures, hour.counts


def _value(kind: Kind, totals: Totals, *, newest: bool = False) -> float | None:
    if kind.name in COMPUTED:
        return COMPUTED[kind.name](totals)
    if kind.hour_is == "highest":
        return (totals.newest if newest else totals.highest).get(kind.name)
    return totals.counts[kind.name] if totals.covered_s else None


def slot_starts(now_ms: int, period: Period = "hour") -> list[int]:
    """The times (epoch ms) at which the slots, equal parts of a period, begin, up to the current slot; oldest first."""
    slot_ms, count = SLOTS[period]
    last = now_ms - now_ms % slot_ms
    return [last - number * slot_ms for number in reversed(range(count))]
