"""The shadow: what the policy that did not serve makes of each decision, worked out after the answer.

It is stored for many decisions at once. Memory is bounded: where too many wait, the newcomer's shadow is dropped and
counted. A decision without one, whether dropped or lost with the process, is no part of any evaluation. How and where
it is worked out is another's business (`ShadowWork`).
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
AT_ONCE = 16  # so that no write of theirs keeps a decision waiting for long
RETRY_S = 1.0
GIVE_UP_AFTER = 30
FINISH_S = 5.0
log = logger("bandit.shadowing")


class ShadowWork(Protocol):
    """Works out shadows, away from the event loop."""

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """In no order. One group at a time. Raises `Unavailable` where there are none, now or ever."""
        ...

    async def close(self) -> None:
        """Fail waiting and later requests for shadows."""
        ...


class Shadower(Protocol):
    """Takes decisions whose shadow is still to be worked out."""

    def add(self, unshadowed: Unshadowed) -> None:
        """One that is stored. Never waits, never raises."""
        ...

    async def close(self) -> None:
        """Finish what was begun."""
        ...


class NoShadow:
    """There is no challenger."""

    def add(self, unshadowed: Unshadowed) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing was begun."""


class BackgroundShadower:
    """Works shadows out in the background. One per process."""

    def __init__(
        self,
        book: DecisionRepository,
        work: ShadowWork,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._book = book
        self._work = work
        self._metrics = metrics
        self._pause = pause
        self._waiting: deque[Unshadowed] = deque()
        self._working: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, unshadowed: Unshadowed) -> None:
        """Soon; or not at all, where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.bandit.shadows.labels("dropped").inc()
            return
        self._waiting.append(unshadowed)
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work_off())

    async def close(self) -> None:
        """Work out and store what waits. What is not done in time, or not stored at once, is lost, and counted."""
        self._closing.set()
        if (working := self._working) is not None:
            await asyncio.wait({working}, timeout=FINISH_S)
            await self._work.close()
            await asyncio.wait({working})
        else:
            await self._work.close()

    async def _work_off(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < AT_ONCE:
                    await self._linger(LINGER_S)
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), AT_ONCE))]
                stored = await self._worked_out(group)
                self._metrics.bandit.shadows.labels("stored" if stored else "lost").inc(len(group))
                if not stored:
                    await self._linger(RETRY_S)  # so that what fails at every try does not fill the log
        finally:
            self._working = None

    async def _worked_out(self, group: Sequence[Unshadowed]) -> bool:
        try:
            return await self._stored(await self._work.shadows(group))
        except Unavailable as error:
            log.warning("shadows_lost", shadows=len(group), error=str(error))
        except Exception:
            log.exception("shadow_failed")
        return False

    async def _stored(self, shadows: list[Shadow]) -> bool:
        for _ in range(GIVE_UP_AFTER):
            try:
                await self._book.add_shadows(shadows)
            except Unavailable as error:
                warn(log, error)("shadows_put_off", shadows=len(shadows), error=str(error))
                if self._closing.is_set():
                    break
                await self._linger(RETRY_S)
            else:
                return True
        return False

    async def _linger(self, seconds: float) -> None:
        """Wait so long, or until the process is about to stop."""
        if self._closing.is_set():
            return
        pause = asyncio.ensure_future(self._pause(seconds))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({pause, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            closing.cancel()
