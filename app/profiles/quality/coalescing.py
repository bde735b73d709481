"""One measurement for all who ask at the same time.

Invariant: whoever asks is answered by a measurement that began after the request came, so it is never older than what
the caller has seen acknowledged. Who comes while one is under way waits for the next, together with others.
"""

from __future__ import annotations

import asyncio

from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.quality.report import QualityReport, report
from app.profiles.quality.scan import Scanner


class SharedMeasurement:
    """Measures in this process, one at a time."""

    def __init__(self, surveyor: Scanner, registry: Registry, clock: Clock) -> None:
        self._surveyor = surveyor
        self._registry = registry
        self._clock = clock
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[QualityReport] | None = None
        self._tasks: set[asyncio.Task[QualityReport]] = set()

    async def measure(self) -> QualityReport:
        """Measure now. Raises `StoreUnavailable`."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._measure())
            self._tasks.add(self._next)
            self._next.add_done_callback(self._ended)
        return await asyncio.shield(self._next)  # whoever goes away leaves it to the others

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[QualityReport]) -> None:
        self._tasks.discard(task)
        if self._next is task:
            self._next = None
        if not task.cancelled():
            task.exception()  # marked as seen: every caller may be gone

    async def _measure(self) -> QualityReport:
        async with self._turn:
            self._next = None  # begun: who comes from here on waits for another
            survey = await self._surveyor.begin()
            async for _ in self._surveyor.pages(survey):
                pass
            return report(survey, self._registry, self._clock.now_ms())
