"""Retention: what is older than a setting goes, in small steps, so that no other writer waits long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from app.features.clock import DAY_MS, Clock
from app.telemetry import logger

STEP = 1_000
PAUSE_S = 0.02
log = logger("events.retention")


class Prunable(Protocol):
    """Where something is kept that grows old."""

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` of the oldest that are of before a moment; how many went."""
        ...


async def prune(
    kept: Prunable,
    clock: Clock,
    retention_days: int,
    pause: Callable[[float], Awaitable[None]],
    budget_s: float = float("inf"),
    *,
    what: str = "events",
) -> bool:
    """Delete what is of before the retention, for about `budget_s` seconds; False where more are left.

    Raises:
        StoreUnavailable: the database does not answer; what went is gone, the rest can go later.
    """
    before_ms = clock.now_ms() - retention_days * DAY_MS
    deadline = clock.monotonic() + budget_s
    total = 0
    while gone := await kept.prune(before_ms, STEP):
        total += gone
        if clock.monotonic() > deadline:
            log.info("pruned", what=what, rows=total, finished=False)
            return False
        await pause(PAUSE_S)
    log.info("pruned", what=what, rows=total, finished=True)
    return True
