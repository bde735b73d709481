"""The timeline of a user: one profile a day, computed by the SQL that serves reads.

Invariant: a feature has a point only if all events of its window are still stored, since a partial window gives a
plausible but wrong value. Events that arrived late count, so a point shows the facts of that day, not the knowledge of
that day.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from app.features.clock import DAY_MS
from app.profiles.history.validation import Moments
from app.profiles.online.cache_protocol import Profile
from app.profiles.ports import ComputeRow

DAYS = 30


class Point(NamedTuple):
    """A user's profile as of a past moment. A feature whose window reaches beyond the retention is absent."""

    at_ms: int
    profile: Profile


def daily(moments: Moments, now_ms: int) -> list[tuple[int, int]]:
    """The last `DAYS` moments that are a day apart, up to now, oldest first, as (milliseconds, mask of features). The
    mask has the features that can be computed as of the moment."""
    width = len(moments.registry)
    found: list[tuple[int, int]] = []
    for days_ago in range(DAYS - 1, -1, -1):
        at_ms = now_ms - days_ago * DAY_MS
        found.append((at_ms, sum(1 << index for index in range(width) if not moments.problem(at_ms, None, 1 << index))))
    return found


async def development(
    read_as_of: Callable[[list[ComputeRow]], Awaitable[list[Profile]]], moments: Moments, user_id: str, now_ms: int
) -> list[Point]:
    """Compute the timeline of a user: one point a day. Raises `StoreUnavailable`. `read_as_of` computes past moments;
    see `ProfileReader.read_as_of`."""
    asked = [ComputeRow(user_id, mask, at_ms) for at_ms, mask in daily(moments, now_ms)]
    profiles = await read_as_of(asked)
    return [Point(row.now_ms or 0, profile) for row, profile in zip(asked, profiles, strict=True)]
