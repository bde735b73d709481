"""The circuit breaker before the model.

Closed, every call goes through. After `TRIP_AFTER` failures in a row it opens: nobody waits for a model that does not
answer, for `PAUSE_S`, twice as long each time, up to `MOST_S`; at once where the endpoint asks for a longer pause. Then
one call, a user's own, tries whether it is well. The breaker before the cache asks in the background instead, because
there a question costs nothing; here each one costs money.

Interleavings: 1. calls that began before it opened end while it is open, and tell nothing of now: they neither lengthen
the pause nor end it; 2. while one call tries, no other does; 3. a try that nobody waits for any more leaves its place
to the next.
"""

from __future__ import annotations

from typing import Literal

from app.features.clock import Clock
from app.telemetry import logger

TRIP_AFTER = 3
PAUSE_S, MOST_S = 5.0, 60.0
Entry = Literal["call", "trial"]
log = logger("generation")


class Breaker:
    """One per model and process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._pause_s = PAUSE_S
        self._open_until: float | None = None
        self._trying = False

    @property
    def closed(self) -> bool:
        """Whether every call goes through."""
        return self._open_until is None

    def enter(self) -> Entry | None:
        """Let a call through, which must `leave` with the entry it got; None where it may not go."""
        if self._open_until is None:
            return "call"
        if self._trying or self._clock.monotonic() < self._open_until:
            return None
        self._trying = True
        return "trial"

    def leave(self, entry: Entry, *, well: bool | None, pause_s: float | None = None) -> None:
        """Tell how the endpoint did: well, ill, or (None) nobody knows. It may ask to be left alone for `pause_s`."""
        if entry == "trial":
            self._trying = False  # 3
        elif not self.closed:
            return  # 1
        if well is None:
            return
        if well:
            self._close()
            return
        self._failures += 1
        if entry == "trial" or (pause_s or 0) > PAUSE_S or self._failures >= TRIP_AFTER:
            self._open(pause_s)

    def _open(self, asked_s: float | None) -> None:
        pause_s = min(MOST_S, max(self._pause_s, asked_s or 0.0))
        self._open_until = self._clock.monotonic() + pause_s
        self._pause_s = min(MOST_S, 2 * self._pause_s)
        log.warning("model_circuit_opened", for_s=pause_s)

    def _close(self) -> None:
        if not self.closed:
            log.info("model_circuit_closed")
        self._failures, self._pause_s, self._open_until = 0, PAUSE_S, None
