"""The figures of the overview: what each is, and how it comes out of summed samples.

A figure is None where nothing is known of it: no sample, or no observation to make a share or a percentile of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from app.operations.samples import Sample, Sum, summed
from app.telemetry import FAST

SLOT_MS = 60_000
SLOTS = 60
HOUR_MS = SLOT_MS * SLOTS
# A minute, and the beat of the samples: so that six of each process are in it.
NOW_MS = 65_000
Unit = Literal["share", "per_s", "ms", "s", "count"]
HourIs = Literal["over all", "total", "highest"]


class Kind(NamedTuple):
    """What a figure is. `hour_is` says what its value for the hour means."""

    name: str
    title: str
    unit: Unit
    hour_is: HourIs
    explanation: str


class Figure(msgspec.Struct):
    """A figure; null where nothing is known of it."""

    title: str
    explanation: str
    unit: Unit
    now: Annotated[float | None, Meta(description="Of the last minute; of a gauge, the newest.")]
    hour: float | None
    hour_is: Annotated[HourIs, Meta(description="What `hour` says: over the whole hour, the total, or the highest.")]
    series: Annotated[list[float | None], Meta(description="One for each of `slots`; the last one is not over.")]


def percentile(buckets: Mapping[str, int], share: float) -> float | None:
    """Seconds that `share` of the observations took at most; None if there are none.

    `buckets` are counts by upper bound. Within a bucket observations are taken to lie evenly, so the percentile lies in
    the bucket of the true one. Above the last bound it is that bound.
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


def _percentile_ms(histogram: str, share: float) -> Callable[[Sum], float | None]:
    def of(found: Sum) -> float | None:
        prefix = f"{histogram}_"
        buckets = {name[len(prefix) :]: count for name, count in found.counts.items() if name.startswith(prefix)}
        seconds = percentile(buckets, share)
        return seconds * 1000 if seconds is not None else None

    return of


def _share(counts: Counter[str], of: str, others: str) -> float | None:
    both = counts[of] + counts[others]
    return counts[of] / both if both else None


def _request_rate(found: Sum) -> float | None:
    requests = sum(count for name, count in found.counts.items() if name.startswith("requests_"))
    return requests / found.served_s if found.served_s else None


def _failed(found: Sum) -> float | None:
    # A request that was shed is a 503, too; it has a figure of its own, and nothing is broken.
    return max(0, found.counts["requests_5xx"] - found.counts["shed"]) if found.covered_s else None


# Any other figure is the count or the gauge of its name.
COMPUTED: dict[str, Callable[[Sum], float | None]] = {
    "request_rate": _request_rate,
    "hit_ratio": lambda found: _share(found.counts, "hits", "misses"),
    "latency_p50_ms": _percentile_ms("latency", 0.5),
    "latency_p99_ms": _percentile_ms("latency", 0.99),
    "failed_requests": _failed,
    "lag_p50_ms": _percentile_ms("lag", 0.5),
    "lag_p99_ms": _percentile_ms("lag", 0.99),
    "consistent": lambda found: _share(found.counts, "checks_consistent", "checks_violation"),
}
KINDS = (
    Kind("request_rate", "Requests", "per_s", "over all", "Reads and events answered, all processes."),
    Kind("hit_ratio", "Hit ratio", "share", "over all", "Feature values that the cache held."),
    Kind("latency_p50_ms", "Latency, median", "ms", "over all", "Half of the answers took at most this."),
    Kind("latency_p99_ms", "Latency, p99", "ms", "over all", "99 of 100 answers took at most this."),
    Kind("failed_requests", "Failed requests", "count", "total", "Answers with a 5xx status, but for shed ones."),
    Kind("shed", "Shed requests", "count", "total", "Sent away with a 503: more load than can be taken."),
    Kind(
        *("degraded_reads", "Degraded reads", "count", "total"),
        "Profiles computed because the cache was away or not trusted. Right, but slower.",
    ),
    Kind(
        *("fills_refused", "Fills refused", "count", "total"),
        "Values not cached because an event came first: the protocol at work.",
    ),
    Kind(
        *("lag_p50_ms", "Lag, median", "ms", "over all"),
        "From an event's arrival to its keys deleted or owed, for half of them at most.",
    ),
    Kind(
        *("lag_p99_ms", "Lag, p99", "ms", "over all"),
        "From an event's arrival to its keys deleted or owed, for 99 of 100 at most.",
    ),
    Kind(
        *("consistent", "Consistent", "share", "over all"),
        "Of the cached profiles that the audit checked 1 s, 1 min and 5 min after an event, those that were the truth.",
    ),
    Kind("queue_depth", "Queue depth", "count", "highest", "Jobs that wait for a worker."),
    Kind("outbox_age_s", "Outbox age", "s", "highest", "For how long the oldest event has waited to be consumed."),
    Kind("outbox", "Outbox", "count", "highest", "Events that no worker has consumed yet."),
    Kind("dead_letters", "Dead letters", "count", "highest", "What could not be consumed and waits for an admin."),
    Kind(
        *("unreadable", "Unreadable evidence", "count", "highest"),
        "Users whose learned evidence is damaged and was set aside.",
    ),
    Kind(
        *("events_ahead", "Events ahead of time", "count", "highest"),
        "Events said to have occurred more than five minutes from now: a clock was wrong when they came.",
    ),
    Kind("owed", "Owed invalidations", "count", "highest", "Deletions that the cache did not take."),
)


def board(
    samples: Sequence[Sample], starts_ms: Sequence[int], now_ms: int
) -> tuple[dict[str, Figure], Mapping[str, int]]:
    """Every figure by its name, and the counts of the hour, which is the slots. Samples come in the order of time."""
    slots: dict[int, list[Sample]] = {start: [] for start in starts_ms}
    for item in samples:
        if (slot := slots.get(item.at_ms - item.at_ms % SLOT_MS)) is not None:
            slot.append(item)
    latest = summed(item for item in samples if item.at_ms > now_ms - NOW_MS)
    hour = summed(item for slot in slots.values() for item in slot)
    sums = [summed(slot) if slot else None for slot in slots.values()]
    found = {
        kind.name: Figure(
            kind.title,
            kind.explanation,
            kind.unit,
            _value(kind, latest),
            hour.highest.get(kind.name) if kind.hour_is == "highest" else _value(kind, hour),
            kind.hour_is,
            [_value(kind, slot) if slot is not None else None for slot in sums],
        )
        for kind in KINDS
    }
    return found, hour.counts


def _value(kind: Kind, found: Sum) -> float | None:
    if kind.name in COMPUTED:
        return COMPUTED[kind.name](found)
    if kind.hour_is == "highest":
        return found.newest.get(kind.name)
    return found.counts[kind.name] if found.covered_s else None


def slot_starts(now_ms: int) -> list[int]:
    """The beginnings of the slots of the hour, the last of which is not over."""
    last = now_ms - now_ms % SLOT_MS
    return [last - number * SLOT_MS for number in reversed(range(SLOTS))]
