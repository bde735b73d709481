"""Batches the consumption of events that queue jobs have stored.

A job is done when its events are durable and their cache keys deleted, so it does not wait for consumption. Consuming
the events of many jobs together takes one query of the log, one of the cache and one commit. If a batch fails, is cut
short or overflows, nothing is lost: the sweep consumes every event that is not marked as consumed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded, Unavailable
from app.events.consume import Consumer
from app.telemetry import logger, warn

BOUNDS = Bounds(kind="consumption", at_once=500, most=100_000, apart_s=0.2)
log = logger("events.handover")


class Handover:
    """Collects stored events and has the consumer consume them in batches, in the background. There is one instance per
    worker process."""

    def __init__(
        self,
        consumer: Consumer,
        within_s: float,
        bounds: Bounds = BOUNDS,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`within_s`: the time limit of one batch, in seconds."""
        self._consumer = consumer
        self._within_s = within_s
        self._at_once = bounds.at_once
        self._batches: Batcher[Sequence[int], None] = Batcher(self._consume, monotonic, bounds, size=len, pause=pause)

    def add(self, seqs: Sequence[int]) -> None:
        """Add stored events, by sequence number, to be consumed soon in the background. The cache keys that the events
        make stale must have been deleted, or recorded for deletion."""
        with suppress(Overloaded):
            for start in range(0, len(seqs), self._at_once):
                self._batches.submit(seqs[start : start + self._at_once])

    async def close(self, grace_s: float) -> None:
        """Consume pending events for up to `grace_s` seconds. No events may be added afterwards."""
        await self._batches.close(grace_s)

    async def _consume(self, parts: Sequence[Sequence[int]]) -> list[None]:
        seqs = [seq for part in parts for seq in part]
        try:
            async with asyncio.timeout(self._within_s):
                await self._consumer.consume(seqs)
        except (Unavailable, TimeoutError) as error:
            warn(log, error)("left_to_the_sweep", events=len(seqs), error=str(error) or type(error).__name__)
        except Exception:
            log.exception("left_to_the_sweep", events=len(seqs))
        return [None] * len(parts)
