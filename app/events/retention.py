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
    event_log: EventLog, clock: Clock, retention_days: int, pause: Callable[[float], Awaitable[None]]
) -> int:
    """Delete every event that occurred before the retention; how many went."""
    before_ms = clock.now_ms() - retention_days * DAY_MS
    total = 0
    while gone := await event_log.prune(before_ms, STEP):
        total += gone
        await pause(PAUSE_S)
    log.info("pruned", events=total)
    return total
