"""Retention: events older than the setting go, in small steps, so that no other writer waits long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from app.events.ports import EventLog
from app.features.clock import DAY_MS, Clock
from app.telemetry import logger

STEP = 1_000
PAUSE_S = 0.02
log = logger("events.retention")


async def prune(
    event_log: EventLog,
    clock: Clock,
    retention_days: int,
    pause: Callable[[float], Awaitable[None]],
    budget_s: float = float("inf"),
) -> bool:
    """Delete events that occurred before the retention, for about `budget_s` seconds; False where more are left.

    Raises:
        StoreUnavailable: the database does not answer; what went is gone, the rest can go later.
    """
    before_ms = clock.now_ms() - retention_days * DAY_MS
    deadline = clock.monotonic() + budget_s
    total = 0
    while gone := await event_log.prune(before_ms, STEP):
        total += gone
        if clock.monotonic() > deadline:
            log.info("pruned", events=total, finished=False)
            return False
        await pause(PAUSE_S)
    log.info("pruned", events=total, finished=True)
    return True
