"""Time, as the rest of the service is handed it, and its one text form.

Wall-clock times are whole milliseconds since 1970 in UTC (`…_ms`); durations on the monotonic clock are seconds.
Nothing in `features`, `profiles` or `events` reads a clock of its own.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Protocol

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
DAY_MS = 86_400_000


class Clock(Protocol):
    """Where time comes from."""

    def now_ms(self) -> int:
        """Wall-clock time in milliseconds since 1970 (UTC); may step either way."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never steps; only differences mean anything."""
        ...


def spoken(span: timedelta) -> str:
    """In the largest unit that needs no fraction: `30 days`, `1 hour`, `90 minutes`; else in seconds."""
    count, unit = f"{span.total_seconds():g}", "seconds"
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
    """RFC 3339 in UTC with milliseconds: `2026-04-25T06:30:00.000Z`."""
    return (EPOCH + moment_ms * MILLISECOND).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment_ms % 1000:03d}Z"
