"""Finds the users behind a number of a quality report, by searching all eligible users in bounded steps.

The report is as of its measurement and may be of a sample; the search is live. Each step is one request. Invariant: a
user that the search passed over was not in the wanted state at that time. So following `next_after` to the end finds
every user who is in the wanted state during the whole search.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.consistency.inspection import InspectedCell, Inspection, Inspector
from app.profiles.online.cache_protocol import NULL
from app.profiles.ports import NewestEvents

PAGE = 200
MOST_SCANNED = 5_000
MOST_S = 1.0
Sought = Literal["fresh", "missing", "stale", "null"]


class FoundUsers(NamedTuple):
    """The result of one step of a search. `users` has one inspection per user found, with one cell; None if the cache
    is unavailable. `scanned` is the number of users that were looked at. The next step begins after the user id
    `next_after`, which is None if all users have been looked at."""

    at_ms: int
    users: list[Inspection] | None
    scanned: int
    next_after: str | None


class Drilldown:
    def __init__(self, *, inspector: Inspector, users: NewestEvents, registry: Registry, clock: Clock) -> None:
        self._inspector = inspector
        self._users = users
        self._registry = registry
        self._clock = clock

    async def find(self, feature: str, sought: Sought, after: str, limit: int) -> FoundUsers:
        """Find users whose cached value of a feature is in the state `sought`, in the order of their ids.

        Look at the eligible users with ids above `after`, until `limit` users are found, `MOST_SCANNED` users have been
        looked at, or `MOST_S` seconds are over.

        Raises:
            UnknownFeature: the registry has no such feature.
            StoreUnavailable: the database does not answer.
        """
        mask = self._registry.mask([feature])
        now_ms = self._clock.now_ms()
        deadline = self._clock.monotonic() + MOST_S
        found: list[Inspection] = []
        scanned = 0
        while scanned < MOST_SCANNED and self._clock.monotonic() <= deadline:
            page = await self._users.eligible(after, now_ms - self._registry.longest_window_ms(), PAGE)
            try:
                inspections = await self._inspector.freshness(page, mask) if page else []
            except CacheUnavailable:
                return FoundUsers(now_ms, None, scanned, None)
            for inspection in inspections:
                scanned += 1
                after = inspection.user_id
                if _is(inspection.cells[0], sought):
                    found.append(inspection)
                    if len(found) == limit:
                        return FoundUsers(now_ms, found, scanned, after)
            if len(page) < PAGE:
                return FoundUsers(now_ms, found, scanned, None)
        return FoundUsers(now_ms, found, scanned, after)


def _is(cell: InspectedCell, sought: Sought) -> bool:
    if sought == "null":
        return cell.held is not None and cell.held.json == NULL
    return cell.state == sought
