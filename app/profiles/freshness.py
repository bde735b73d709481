"""Freshness, measured over the eligible users: what the cache really holds, against the log.

*Missing*: no live value. *Stale*: a live value whose sequence number is older than the user's newest event of a
subject that invalidates it, that is, an invalidation which did not happen. *Fresh*: every other live value. So
fresh + missing + stale = eligible. A stale value is looked at again before it counts: between an event's commit and
its DEL, which takes a millisecond, it is no fault.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from app.errors import CacheUnavailable
from app.features.clock import DAY_MS, Clock
from app.features.registry import Feature, Registry
from app.profiles.codec import Value, decode
from app.profiles.ports import Cache, Cell, NewestEvents

ELIGIBLE_DAYS = 30
CHUNK = 200
SECOND_LOOK_S = 0.3
MAX_CATEGORIES = 24


@dataclass(slots=True)
class FeatureFreshness:
    """One feature's figures. Ages are in milliseconds, `values` what was cached (None for null)."""

    eligible: int = 0
    fresh: int = 0
    missing: int = 0
    stale: int = 0
    ages_ms: list[int] = field(default_factory=list)
    values: Counter[float | int | str | None] = field(default_factory=Counter)


@dataclass(slots=True, frozen=True)
class Report:
    """All features, at one moment. `measured` False: the cache was away, only `eligible` means anything."""

    at_ms: int
    eligible: int
    measured: bool
    features: dict[str, FeatureFreshness]


class FreshnessMeter:
    """Measures in chunks of users, with bounded memory but for one age a live value."""

    def __init__(
        self,
        *,
        cache: Cache,
        users: NewestEvents,
        registry: Registry,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._cache = cache
        self._users = users
        self._registry = registry
        self._clock = clock
        self._pause = pause

    async def measure(self) -> Report:
        """Look at every eligible user's cells.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        now_ms = self._clock.now_ms()
        since_ms = now_ms - ELIGIBLE_DAYS * DAY_MS
        features = {entry.name: FeatureFreshness() for entry in self._registry}
        after, eligible, measured = "", 0, self._cache.available
        while page := await self._users.eligible(after, since_ms, CHUNK):
            after = page[-1]
            eligible += len(page)
            if measured:
                try:
                    await self._add(page, features, now_ms)
                except CacheUnavailable:
                    measured = False
        return Report(now_ms, eligible, measured, features)

    async def _add(self, page: Sequence[str], features: dict[str, FeatureFreshness], now_ms: int) -> None:
        newest = await self._users.newest(page)
        cells = [(user_id, entry) for user_id in page for entry in self._registry]
        values = await self._values(cells)
        seen = {
            (user_id, entry.name): max(newest.get((user_id, subject), 0) for subject in entry.invalidated_by)
            for user_id, entry in cells
        }
        suspects = [
            (user_id, entry)
            for (user_id, entry), value in zip(cells, values, strict=True)
            if value is not None and value.seq < seen[user_id, entry.name]
        ]
        if suspects:
            await self._pause(SECOND_LOOK_S)
            again = dict(zip(((u, e.name) for u, e in suspects), await self._values(suspects), strict=True))
            values = [
                again.get((user_id, entry.name), value) for (user_id, entry), value in zip(cells, values, strict=True)
            ]
        for (user_id, entry), value in zip(cells, values, strict=True):
            figures = features[entry.name]
            figures.eligible += 1
            if value is None:
                figures.missing += 1
                continue
            figures.ages_ms.append(max(0, now_ms - value.computed_at_ms))
            figures.values[msgspec.json.decode(value.json)] += 1
            if value.seq < seen[user_id, entry.name]:
                figures.stale += 1
            else:
                figures.fresh += 1

    async def _values(self, cells: Sequence[tuple[str, Feature]]) -> list[Value | None]:
        _, held = await self._cache.read([Cell(user_id, entry.name) for user_id, entry in cells])
        values = (decode(raw) for raw in held)
        return [
            value if value is not None and value.fingerprint == entry.fingerprint.encode() else None
            for value, (_, entry) in zip(values, cells, strict=True)
        ]


def percentiles(ages_ms: list[int], shares: Sequence[float]) -> list[int | None]:
    """Nearest-rank percentiles of ages, None each where there is none."""
    ordered = sorted(ages_ms)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None for share in shares]


def distribution(entry: Feature, values: Counter[float | int | str | None]) -> list[dict[str, object]]:
    """Counts of the values that are not null: ten equal bins for floats and wide ints, else one a value.

    A bin is `{"from", "to", "count"}` (`to` belongs to the last bin only); a category `{"value", "count"}`.
    """
    known = Counter({value: count for value, count in values.items() if value is not None})
    if not known:
        return []
    if entry.dtype == "str" or (entry.dtype == "int" and len(known) <= MAX_CATEGORIES):
        ranked = known.most_common(MAX_CATEGORIES) if entry.dtype == "str" else sorted(known.items(), key=_by_value)
        return [{"value": value, "count": count} for value, count in ranked]
    numbers = {float(value): count for value, count in known.items() if not isinstance(value, str)}
    low, high = min(numbers), max(numbers)
    width = (high - low) / 10 or 1.0
    counts = [0] * 10
    for number, count in numbers.items():
        counts[min(9, int((number - low) / width))] += count
    return [
        {"from": low + place * width, "to": low + (place + 1) * width, "count": count}
        for place, count in enumerate(counts)
    ]


def _by_value(item: tuple[float | int | str | None, int]) -> float:
    return float(item[0] or 0)
