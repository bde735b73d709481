"""The users behind a number: a bounded search of all eligible users, which a next request continues.

A number in a report is as of its own time, and may be of a sample; the search is live. Invariant: a user that a search
passed over was not in the state asked for. So following `next_after` to its end finds every user that stays in it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.consistency.inspection import CellFreshness, Inspector
from app.profiles.ports import NewestEvents

PAGE = 200
MOST_SCANNED = 5_000
MOST_S = 1.0
Sought = Literal["fresh", "missing", "stale", "null"]


class Behind(NamedTuple):
    """What a search found. It continues after `next_after`, None at the end. `looks` is None if the cache is away."""

    at_ms: int
    looks: list[CellFreshness] | None
    scanned: int
    next_after: str | None


class Drilldown:
    """Reads `PAGE` users at a time, and stops after `MOST_SCANNED` users or `MOST_S` seconds."""

    def __init__(self, *, inspector: Inspector, users: NewestEvents, registry: Registry, clock: Clock) -> None:
        self._inspector = inspector
        self._users = users
        self._registry = registry
        self._clock = clock

    async def find(self, feature: str, sought: Sought, after: str, limit: int) -> Behind:
        """Up to `limit` users above `after`, among the next `MOST_SCANNED` eligible, in about `MOST_S` seconds.

        Raises:
            UnknownFeature: there is no such feature.
            StoreUnavailable: the database does not answer.
        """
        mask = self._registry.mask([feature])
        now_ms = self._clock.now_ms()
        deadline = self._clock.monotonic() + MOST_S
        found: list[CellFreshness] = []
        scanned = 0
        while scanned < MOST_SCANNED and self._clock.monotonic() <= deadline:
            page = await self._users.eligible(after, now_ms - self._registry.longest_window_ms(), PAGE)
            try:
                looks = await self._inspector.freshness(page, mask) if page else []
            except CacheUnavailable:
                return Behind(now_ms, None, scanned, None)
            for look in looks:
                scanned += 1
                after = look.user_id
                if _is(look, sought):
                    found.append(look)
                    if len(found) == limit:
                        return Behind(now_ms, found, scanned, after)
            if len(page) < PAGE:
                return Behind(now_ms, found, scanned, None)
        return Behind(now_ms, found, scanned, after)


def _is(look: CellFreshness, sought: Sought) -> bool:
    if sought == "null":
        return look.value is not None and look.value.json == b"null"
    return look.state == sought
