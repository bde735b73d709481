"""A clock that tests set."""

from __future__ import annotations

from datetime import UTC, datetime

from app.features.clock import to_ms

NOW_MS = to_ms(datetime(2026, 4, 25, 12, 0, tzinfo=UTC))


class FakeClock:
    """Implements `app.features.clock.Clock`; stands still until a test moves it."""

    def __init__(self, now_ms: int = NOW_MS, monotonic_s: float = 1_000.0) -> None:
        self._now_ms = now_ms
        self._monotonic_s = monotonic_s

    def now_ms(self) -> int:
        """The wall clock."""
        return self._now_ms

    def monotonic(self) -> float:
        """The clock that never steps."""
        return self._monotonic_s

    def advance(self, ms: int) -> None:
        """Let time pass: both clocks move."""
        if ms < 0:
            raise ValueError("time does not pass backwards; use step_to")
        self._now_ms += ms
        self._monotonic_s += ms / 1_000

    def step_to(self, now_ms: int) -> None:
        """Set the wall clock, as an operator does; no time passes."""
        self._now_ms = now_ms
