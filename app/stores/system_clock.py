"""The clock of this machine. Only composition roots create it; other code receives a `Clock`."""

from __future__ import annotations

import time


class SystemClock:
    """Wall-clock and monotonic time of the operating system. Implements `app.features.clock.Clock`."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()
