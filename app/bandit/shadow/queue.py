"""The queue of decisions whose shadow is computed after the answer.

Shadows are stored in groups. Memory is bounded: if `MOST_WAITING` decisions wait, the next one stays without a shadow
and is counted as dropped. Decisions without a shadow, dropped or lost with the process, are not evaluated.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from app.bandit.decisions import Shadow
from app.bandit.ports import DecisionRepository
from app.bandit.shadow.scores import Unshadowed
from app.errors import Unavailable
from app.telemetry import Metrics, logger, warn

MOST_WAITING = 2_000
LINGER_S = 0.1
AT_ONCE = 16  # small, so that storing them does not delay a decision for long
RETRY_S = 1.0
GIVE_UP_AFTER = 30
FINISH_S = 5.0
log = logger("bandit.shadow")


class ShadowWork(Protocol):
    """Computes shadows outside the event loop."""

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """The shadows of a group, in any order. Must not be called concurrently.

        Raises:
            Unavailable: they cannot be computed, now or ever.
        """
        ...

    async def close(self) -> None:
        """Fail the pending call and all later ones."""
        ...


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
        self._waiting: deque[Unshadowed] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, unshadowed: Unshadowed) -> None:
        """Queue a stored decision, or drop it if too many wait. Never blocks and never raises."""
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.bandit.shadows.labels("dropped").inc()
            return
        self._waiting.append(unshadowed)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def close(self) -> None:
        """Compute and store the waiting shadows. Those not stored within `FINISH_S` are lost, and counted."""
        self._closing.set()
        if (task := self._task) is not None:
            await asyncio.wait({task}, timeout=FINISH_S)
            await self._work.close()
            await asyncio.wait({task})
        else:
            await self._work.close()

    async def _drain(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < AT_ONCE:
                    await self._linger(LINGER_S)
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), AT_ONCE))]
                stored = await self._compute(group)
                self._metrics.bandit.shadows.labels("stored" if stored else "lost").inc(len(group))
                if not stored:
                    await self._linger(RETRY_S)  # a failure that repeats must not flood the log
        finally:
            self._task = None

    async def _compute(self, group: Sequence[Unshadowed]) -> bool:
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
        """Sleep, but not beyond `close`."""
        if self._closing.is_set():
            return
        pause = asyncio.ensure_future(self._pause(seconds))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({pause, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            closing.cancel()
