"""The trust gate: may a read believe what the cache holds?

Invariant: `holds()` is True only on the word of a look at the owed invalidations that began at most `LOOK_VALID_S`
before and found none. An answer that could not invalidate is held back for `HOLD_BACK_S` after it recorded its debt,
so when it is given, every look that missed the debt has expired, in every process.
"""

from __future__ import annotations

from collections.abc import Callable

from app.errors import StoreUnavailable
from app.features.clock import Clock

LOOK_VALID_S = 0.050
HOLD_BACK_S = 0.100


class TrustGate:
    """Looks when the last look is too old; never on a timer, which a busy event loop would starve."""

    def __init__(self, any_owed: Callable[[], bool], clock: Clock, on_owed: Callable[[], None]) -> None:
        """`on_owed` is called each time a check finds an owed invalidation, so that it is made."""
        self._any_owed = any_owed
        self._clock = clock
        self._on_owed = on_owed
        self._looked_at = float("-inf")
        self._clear = False

    def holds(self) -> bool:
        """Whether the cache may be believed by a read that begins now."""
        now = self._clock.monotonic()
        if not 0 <= now - self._looked_at <= LOOK_VALID_S:
            self._looked_at = now  # before the look: what it sees is at least this new
            try:
                self._clear = not self._any_owed()
            except StoreUnavailable:
                self._clear = False
            if not self._clear:
                self._on_owed()
        return self._clear
