"""Decides which moments may be asked for: none in the future, and none before which a window exceeds the retention.

If only a part of the events in a window is still stored, the value is plausible but wrong.
"""

from __future__ import annotations

import msgspec

from app.errors import Issue
from app.features.clock import DAY_MS, Clock, rfc3339
from app.features.registry import Registry


class Moments(msgspec.Struct, frozen=True):
    """Checks whether features can be computed as of a past moment."""

    registry: Registry
    retention_days: int
    clock: Clock

    def problem(self, at_ms: int, known_at_ms: int | None, mask: int) -> Issue | None:
        """The problem with `as_of` or `known_at` for the features in the mask; None if both are allowed."""
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
