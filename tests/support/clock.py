"""A clock that tests set."""

import asyncio
from datetime import UTC, datetime

from app.features.clock import to_ms

NOW_MS = to_ms(datetime(2026, 4, 25, 12, 0, tzinfo=UTC))


class FakeClock:
    """Implements `app.features.clock.Clock`. It advances only when a test moves it."""

    def __init__(self, now_ms: int = NOW_MS, monotonic_s: float = 1_000.0) -> None:
        self._now_ms = now_ms
        self.monotonic_s = monotonic_s

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        return self.monotonic_s

    def advance(self, ms: int) -> None:
        """Advance both clocks."""
        if ms < 0:
            raise ValueError("time cannot go back; use step_to to step the wall clock")
        self._now_ms += ms
        self.monotonic_s += ms / 1_000

    def step_to(self, now_ms: int) -> None:
        """Step the wall clock; the monotonic clock does not change."""
        self._now_ms = now_ms


async def no_pause(_: float) -> None:
    """A pause of one turn of the event loop, in place of `asyncio.sleep`."""
    await asyncio.sleep(0)
