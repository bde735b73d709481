"""The clock that is passed to services, and the text form of times. Times (`…_ms`) are in ms since 1970 in UTC."""

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
CLOCK_SKEW_MS = 1_000  # by which the clocks of two processes may differ


class Clock(Protocol):
    def now_ms(self) -> int:
        """Milliseconds since 1970 in UTC, from the wall clock, which may step in both directions."""

    def monotonic(self) -> float:
        """Seconds on a clock that never steps. Only differences have a meaning."""


class SystemClock:
    """The clock of this machine. Only composition roots create it; other code receives a `Clock`."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


def spoken(span: timedelta) -> str:
    """A duration as text in the largest unit in which it is whole, such as `90 minutes`; otherwise `1.5 seconds`."""
    count, unit = f"{span.total_seconds():.6f}".rstrip("0").rstrip("."), "seconds"
    for name in ("days", "hours", "minutes"):
        whole, rest = divmod(span, timedelta(**{name: 1}))
        if whole and not rest:
            count, unit = str(whole), name
            break
    return f"{count} {unit.removesuffix('s') if count == '1' else unit}"


def to_ms(moment: datetime) -> int:
    """Milliseconds since 1970 of an aware datetime, rounded down."""
    return (moment - EPOCH) // MILLISECOND


def rfc3339(moment_ms: int) -> str:
    """A time in milliseconds since 1970 as text in UTC, such as `2026-04-25T06:30:00.000Z`."""
    return (EPOCH + moment_ms * MILLISECOND).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment_ms % 1000:03d}Z"
