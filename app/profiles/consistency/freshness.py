"""Freshness of cells, measured: what the cache really holds, against the log.

*Missing*: no live value. *Stale*: a live value whose sequence number is older than the user's newest event of a
subject that invalidates it, that is, an invalidation which did not happen. *Fresh*: every other live value. So each
cell is one of the three. A stale value is looked at again before it counts: between an event's commit and its DEL,
which takes a millisecond, it is no fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.registry import Registry, indices
from app.profiles.codec import Value, decode
from app.profiles.consistency.inspection import State
from app.profiles.ports import Cache, Cell, NewestEvents

SECOND_LOOK_S = 0.3


class CellFreshness(NamedTuple):
    """What was seen of one cell; `value` is the live one, `feature` an index."""

    user_id: str
    feature: int
    state: State
    value: Value | None


class FreshnessMeter:
    """Looks at the cells of some users at a time."""

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
        self._fingerprints = [entry.fingerprint.encode() for entry in registry]

    async def look(self, user_ids: Sequence[str], mask: int | None = None) -> list[CellFreshness]:
        """The cells of each user, in order, of the features in `mask` or of all.

        Raises:
            CacheUnavailable: also while the circuit breaker is open, at once.
            StoreUnavailable: the database does not answer.
        """
        if not self._cache.available:
            raise CacheUnavailable("no cache is set, or it did not answer a moment ago")
        if not user_ids:
            return []
        wanted = indices(self._registry.full_mask if mask is None else mask)
        newest = await self._users.newest(user_ids)
        needed = {
            (user_id, index): max(newest.get((user_id, s), 0) for s in self._registry[index].invalidated_by)
            for user_id in user_ids
            for index in wanted
        }
        values = await self._values(list(needed))
        suspects = [place for place, value in values.items() if value is not None and value.seq < needed[place]]
        if suspects:
            await self._pause(SECOND_LOOK_S)
            values |= await self._values(suspects)
        return [
            CellFreshness(user_id, index, _state(value, needed[user_id, index]), value)
            for (user_id, index), value in values.items()
        ]

    async def _values(self, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Value | None]:
        names = self._registry.names
        _, held = await self._cache.read([Cell(user_id, names[index]) for user_id, index in places])
        return {place: self._live(place[1], raw) for place, raw in zip(places, held, strict=True)}

    def _live(self, index: int, raw: bytes | None) -> Value | None:
        value = decode(raw)
        return value if value is not None and value.fingerprint == self._fingerprints[index] else None


def _state(value: Value | None, needed_seq: int) -> State:
    if value is None:
        return "missing"
    return "stale" if value.seq < needed_seq else "fresh"
