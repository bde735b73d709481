"""The figures of the overview: what each is, and how it comes out of summed samples.

A figure is None where nothing is known of it: no sample, or no observation to make a share or a percentile of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from app.operations.buckets import percentile
from app.operations.samples import Sample, Sum, in_slots, joined, summed

SLOT_MS = 60_000
SLOTS = 60
HOUR_MS = SLOT_MS * SLOTS
# A minute, and the beat of the samples: so that six of each process are in it.
NOW_MS = 65_000
Unit = Literal["share", "per_s", "ms", "s", "count"]
HourIs = Literal["over all", "total", "highest"]


class Kind(NamedTuple):
    """What a figure is. `hour_is` says what its figure for the hour means."""

    name: str
    title: str
    unit: Unit
    hour_is: HourIs
    of: Callable[[Sum], float | None]
    explanation: str


class Figure(NamedTuple):
    """A figure for the last minute, for the hour, and for each slot of the hour."""

    kind: Kind
    now: float | None
    hour: float | None
    series: list[float | None]


def _hit_ratio(found: Sum) -> float | None:
    asked = found.counts["hits"] + found.counts["misses"]
    return found.counts["hits"] / asked if asked else None


def _consistent(found: Sum) -> float | None:
    checked = found.counts["checks_consistent"] + found.counts["checks_violation"]
    return found.counts["checks_consistent"] / checked if checked else None


def _request_rate(found: Sum) -> float | None:
    requests = sum(count for name, count in found.counts.items() if name.startswith("requests_"))
    return requests / found.served_s if found.served_s else None


def _latency(share: float) -> Callable[[Sum], float | None]:
    return lambda found: _ms(percentile(found.latency, share))


def _lag(share: float) -> Callable[[Sum], float | None]:
    return lambda found: _ms(percentile(found.lag, share))


def _ms(seconds: float | None) -> float | None:
    return seconds * 1000 if seconds is not None else None


def _count(name: str) -> Callable[[Sum], float | None]:
    return lambda found: found.counts[name] if found.covered_s else None


def _failed(found: Sum) -> float | None:
    # What was shed is a 503, too; it has a figure of its own, and nothing is broken.
    return max(0, found.counts["requests_5xx"] - found.counts["shed"]) if found.covered_s else None


def _newest(name: str) -> Callable[[Sum], float | None]:
    return lambda found: found.newest.get(name)


KINDS = (
    Kind("request_rate", "Requests", "per_s", "over all", _request_rate, "Reads and events answered, all processes."),
    Kind("hit_ratio", "Hit ratio", "share", "over all", _hit_ratio, "Feature values that the cache held."),
    Kind(
        "latency_p50_ms", "Latency, median", "ms", "over all", _latency(0.5), "Half of the answers took at most this."
    ),
    Kind("latency_p99_ms", "Latency, p99", "ms", "over all", _latency(0.99), "99 of 100 answers took at most this."),
    Kind(
        "failed_requests", "Failed requests", "count", "total", _failed, "Answers with a 5xx status, but for shed ones."
    ),
    Kind(
        "shed", "Shed requests", "count", "total", _count("shed"), "Sent away with a 503: more load than can be taken."
    ),
    Kind(
        "degraded_reads",
        "Degraded reads",
        "count",
        "total",
        _count("degraded_reads"),
        "Profiles computed because the cache was away or not trusted. Right, but slower.",
    ),
    Kind(
        "fills_refused",
        "Fills refused",
        "count",
        "total",
        _count("fills_refused"),
        "Values not cached because an event came first: the protocol at work.",
    ),
    Kind(
        "lag_p50_ms",
        "Lag, median",
        "ms",
        "over all",
        _lag(0.5),
        "From an event's arrival to its keys deleted or owed, for half of them at most.",
    ),
    Kind(
        "lag_p99_ms",
        "Lag, p99",
        "ms",
        "over all",
        _lag(0.99),
        "From an event's arrival to its keys deleted or owed, for 99 of 100 at most.",
    ),
    Kind(
        "consistent",
        "Consistent",
        "share",
        "over all",
        _consistent,
        "Of the cached profiles that the audit checked 1 s, 1 min and 5 min after an event, those that were the truth.",
    ),
    Kind("queue_depth", "Queue depth", "count", "highest", _newest("queue_depth"), "Jobs that wait for a worker."),
    Kind(
        "outbox_age_s",
        "Outbox age",
        "s",
        "highest",
        _newest("outbox_age_s"),
        "For how long the oldest event has waited to be consumed.",
    ),
    Kind("outbox", "Outbox", "count", "highest", _newest("outbox"), "Events that no worker has consumed yet."),
    Kind(
        "dead_letters",
        "Dead letters",
        "count",
        "highest",
        _newest("dead_letters"),
        "What could not be consumed and waits for an admin.",
    ),
    Kind(
        "unreadable",
        "Unreadable evidence",
        "count",
        "highest",
        _newest("unreadable"),
        "Users whose learned evidence is damaged and was set aside.",
    ),
    Kind(
        "events_ahead",
        "Events ahead of time",
        "count",
        "highest",
        _newest("events_ahead"),
        "Events said to have occurred more than five minutes from now: a clock was wrong when they came.",
    ),
    Kind("owed", "Owed invalidations", "count", "highest", _newest("owed"), "Deletions that the cache did not take."),
)


class Board(NamedTuple):
    """Every figure by its name, and everything that was counted within the hour."""

    figures: dict[str, Figure]
    counted: Mapping[str, int]


def board(samples: Sequence[Sample], starts_ms: Sequence[int], now_ms: int) -> Board:
    """The figures of samples, which come in the order of time. The hour is what the slots hold."""
    latest = summed(item for item in samples if item.at_ms > now_ms - NOW_MS)
    slots = in_slots(samples, starts_ms, SLOT_MS)
    hour = joined(slot for slot in slots if slot is not None)
    found = {
        kind.name: Figure(
            kind,
            kind.of(latest),
            hour.highest.get(kind.name) if kind.hour_is == "highest" else kind.of(hour),
            [kind.of(slot) if slot is not None else None for slot in slots],
        )
        for kind in KINDS
    }
    return Board(found, hour.counts)


def slot_starts(now_ms: int) -> list[int]:
    """The beginnings of the slots of the hour, the last of which is not over."""
    last = now_ms - now_ms % SLOT_MS
    return [last - number * SLOT_MS for number in reversed(range(SLOTS))]
