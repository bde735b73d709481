"""The machine's clock, for composition roots to hand out."""

from __future__ import annotations

import time


class SystemClock:
    """Implements `app.features.clock.Clock`."""

    def now_ms(self) -> int:
        """Wall-clock time."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()
