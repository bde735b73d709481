"""Batches the consumption of events that queue jobs have stored.

A job is done when its events are durable and their keys deleted, so it does not wait for consumption. Consuming the
events of many jobs together takes one query of the log, one of the cache and one commit. If a batch fails, is cut short
or overflows, nothing is lost: the sweep consumes every event that is not marked as consumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from app.errors import Unavailable
from app.events.consume import Consumer
from app.telemetry import logger, warn

LINGER_S = 0.2
EVENTS_AT_ONCE = 500
PENDING_CAP = 100_000
log = logger("events.handover")


class Handover:
    """Passes stored events from jobs to the consumer of the same process."""

    def __init__(
        self, consumer: Consumer, within_s: float, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """`within_s`: the time limit of one batch."""
        self._consumer = consumer
        self._within_s = within_s
        self._pause = pause
        self._pending: list[int] = []
        self._consuming: asyncio.Task[None] | None = None

    def add(self, seqs: Sequence[int]) -> None:
        """Add events that are stored and whose keys are deleted or owed. They are consumed soon, in the background."""
        if not seqs or len(self._pending) > PENDING_CAP:
            return
        self._pending.extend(seqs)
        if self._consuming is None:
            self._consuming = asyncio.get_running_loop().create_task(self._consume_all())

    async def close(self, grace_s: float) -> None:
        """Consume pending events for up to `grace_s` seconds. No events may be added afterwards."""
        if (consuming := self._consuming) is not None:
            await asyncio.wait({consuming}, timeout=grace_s)
            consuming.cancel()
            await asyncio.gather(consuming, return_exceptions=True)

    async def _consume_all(self) -> None:
        try:
            while self._pending:
                if len(self._pending) < EVENTS_AT_ONCE:
                    await self._pause(LINGER_S)
                seqs, self._pending = self._pending[:EVENTS_AT_ONCE], self._pending[EVENTS_AT_ONCE:]
                await self._consume(seqs)
        finally:
            self._consuming = None

    async def _consume(self, seqs: Sequence[int]) -> None:
        try:
            async with asyncio.timeout(self._within_s):
                await self._consumer.consume(seqs)
        except (Unavailable, TimeoutError) as error:
            warn(log, error)("left_to_the_sweep", events=len(seqs), error=str(error) or type(error).__name__)
        except Exception:
            log.exception("left_to_the_sweep", events=len(seqs))
