"""Which past moments may be asked about: not the future, and none whose window reaches back beyond kept history.

A window that is only half kept would give a value that looks right and is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.errors import Issue
from app.features.clock import DAY_MS, Clock, rfc3339
from app.features.registry import Registry


@dataclass(frozen=True, slots=True)
class Moments:
    """The rule, for one registry and retention."""

    registry: Registry
    retention_days: int
    clock: Clock

    def problem(self, at_ms: int, known_at_ms: int | None, mask: int) -> Issue | None:
        """What is wrong with `as_of` or `known_at` for these features; None where nothing is."""
        now_ms = self.clock.now_ms()
        if at_ms > now_ms:
            return Issue("as_of", f"lies in the future; it is {rfc3339(now_ms)} here")
        window_ms = self.registry.longest_window_ms(mask)
        kept_from_ms = now_ms - self.retention_days * DAY_MS
        if at_ms - window_ms < kept_from_ms:
            earliest = rfc3339(kept_from_ms + window_ms)
            return Issue("as_of", f"reaches back beyond kept history; the earliest possible is {earliest}")
        if known_at_ms is not None and known_at_ms > now_ms:
            return Issue("known_at", f"lies in the future; it is {rfc3339(now_ms)} here")
        return None
