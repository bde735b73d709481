"""Queues answered decisions, and has their shadows (the rankings by the policy that did not serve) computed and stored.

Shadows are stored in groups. Memory is bounded: if `BOUNDS.most` decisions wait, the next one gets no shadow and is
counted as dropped. A decision without a shadow, dropped or lost with the process, is left out of the evaluation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from app.bandit.decisions import Shadow
from app.bandit.ports import DecisionRepository
from app.bandit.shadow.scores import Unshadowed
from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded, Unavailable
from app.telemetry import Metrics, logger, warn

# A group is small, so that storing it does not delay a decision for long.
BOUNDS = Bounds(kind="shadows", at_once=16, most=2_000, apart_s=0.1)
RETRY_S = 1.0
GIVE_UP_AFTER = 30
FINISH_S = 5.0
log = logger("bandit.shadow")


class ShadowWork(Protocol):
    """Computes the shadows of decisions outside the event loop."""

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """Compute the shadow of each decision; the results may come in any order. Must not be called concurrently.

        Raises:
            Unavailable: the shadows cannot be computed. The queue does not call again for the same decisions.
        """

    async def close(self) -> None:
        """Stop: the call in progress and all later calls raise `Unavailable`."""


class ShadowQueue:
    def __init__(
        self,
        decisions: DecisionRepository,
        work: ShadowWork,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._decisions = decisions
        self._work = work
        self._metrics = metrics
        self._pause = pause
        self._groups: Batcher[Unshadowed, None] = Batcher(self._compute, time.monotonic, BOUNDS, pause=self._linger)
        self._closing = asyncio.Event()

    def add(self, unshadowed: Unshadowed) -> None:
        """Queue a stored decision to have its shadow computed, or drop it if too many wait. Never blocks or raises."""
        try:
            self._groups.submit(unshadowed)
        except Overloaded:
            self._metrics.bandit.shadows.labels("dropped").inc()

    async def close(self) -> None:
        """Compute and store the waiting shadows. Shadows not stored within `FINISH_S` seconds are counted as lost."""
        self._closing.set()
        finishing = asyncio.ensure_future(self._groups.close())
        await asyncio.wait({finishing}, timeout=FINISH_S)
        await self._work.close()
        await finishing

    async def _compute(self, group: Sequence[Unshadowed]) -> list[None]:
        stored = await self._try_to_store(group)
        self._metrics.bandit.shadows.labels("stored" if stored else "lost").inc(len(group))
        if not stored:
            await self._linger(RETRY_S)  # a failure that repeats must not flood the log
        return [None] * len(group)

    async def _try_to_store(self, group: Sequence[Unshadowed]) -> bool:
        try:
            return await self._store(await self._work.shadows(group))
        except Unavailable as error:
            log.warning("shadows_lost", shadows=len(group), error=str(error))
        except Exception:
            log.exception("shadow_failed")
        return False

    async def _store(self, shadows: list[Shadow]) -> bool:
        for _ in range(GIVE_UP_AFTER):
            try:
                await self._decisions.add_shadows(shadows)
            except Unavailable as error:
                warn(log, error)("shadows_put_off", shadows=len(shadows), error=str(error))
                if self._closing.is_set():
                    break
                await self._linger(RETRY_S)
            else:
                return True
        return False

    async def _linger(self, seconds: float) -> None:
        """Sleep for some seconds, or until `close` is called."""
        if self._closing.is_set():
            return
        pause = asyncio.ensure_future(self._pause(seconds))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({pause, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            closing.cancel()
