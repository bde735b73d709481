"""Past moments: whether a profile can be computed as of one, and the timeline of a user, one profile a day.

Invariants: no moment lies in the future. A feature has a value only if all events of its window are still stored, since
a part of them gives a plausible but wrong value. An event counts from its event time on, even if it arrived later;
requests can set `known_at` to leave out events that arrived after that time. The timeline does not set it, so a point
may count events that the service received only after that day.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from app.errors import Issue
from app.features.clock import DAY_MS, Clock, rfc3339
from app.features.registry import Registry
from app.profiles.online.cache_protocol import Profile
from app.profiles.ports import ComputeRow

DAYS = 30


class Moments(msgspec.Struct, frozen=True):
    """Checks whether features can be computed as of a past moment."""

    registry: Registry
    retention_days: int
    clock: Clock

    def problem(self, at_ms: int, known_at_ms: int | None, mask: int) -> Issue | None:
        """Why the features in the mask cannot be computed as of `at_ms` from the events received by `known_at_ms`
        (None: from all events); None if they can."""
        now_ms = self.clock.now_ms()
        if at_ms > now_ms:
            return Issue("as_of", f"lies in the future; the time of the service is {rfc3339(now_ms)}")
        window_ms = self.registry.longest_window_ms(mask)
        kept_from_ms = now_ms - self.retention_days * DAY_MS
        if at_ms - window_ms < kept_from_ms:
            earliest = rfc3339(kept_from_ms + window_ms)
            return Issue("as_of", f"reaches back beyond kept history; the earliest possible is {earliest}")
        if known_at_ms is not None and known_at_ms > now_ms:
            return Issue("known_at", f"lies in the future; the time of the service is {rfc3339(now_ms)}")
        return None

    def daily(self, now_ms: int) -> list[tuple[int, int]]:
        """The last `DAYS` moments that are a day apart, oldest first, ending with `now_ms`; each as (milliseconds, mask
        of the features that can be computed as of then)."""
        bits = [1 << index for index in range(len(self.registry))]
        moments = [now_ms - days_ago * DAY_MS for days_ago in range(DAYS - 1, -1, -1)]
        return [(at_ms, sum(bit for bit in bits if not self.problem(at_ms, None, bit))) for at_ms in moments]


class Point(NamedTuple):
    """A user's profile as of the past moment `at_ms`. A feature whose window reaches beyond the retention is absent."""

    at_ms: int
    profile: Profile


async def development(
    read_as_of: Callable[[list[ComputeRow]], Awaitable[list[Profile]]], moments: Moments, user_id: str, now_ms: int
) -> list[Point]:
    """Compute the timeline of a user: one point a day. Raises `StoreUnavailable`. `read_as_of` computes past moments;
    see `ProfileReader.read_as_of`."""
    asked = [ComputeRow(user_id, mask, at_ms) for at_ms, mask in moments.daily(now_ms)]
    profiles = await read_as_of(asked)
    return [Point(row.now_ms or 0, profile) for row, profile in zip(asked, profiles, strict=True)]
