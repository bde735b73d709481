"""Takes a sample of its own process every ten seconds.

Invariants: nothing that goes wrong here ends the loop or reaches a request; what could not be stored is part of the
next sample; nothing is counted twice; no state gets worse because of one answer that came late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from app.errors import Unavailable
from app.features.clock import Clock
from app.operations.ports import SampleStore
from app.operations.samples import Gauges, Process, Sample, read
from app.operations.states import ReadinessCheck, looks_of
from app.telemetry import Metrics

EVERY_S = 10.0
LAST_S = 0.3
ASK_AGAIN_S = 1.0


class Sampler:
    """One process's."""

    def __init__(
        self,
        *,
        process: Process,
        metrics: Metrics,
        store: SampleStore,
        ask_gauges: Callable[[], Awaitable[Gauges]],
        ask_readiness: Callable[[], Awaitable[Mapping[str, ReadinessCheck]]],
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._process = process
        self._metrics = metrics
        self._store = store
        self._ask_gauges = ask_gauges
        self._ask_readiness = ask_readiness
        self._clock = clock
        self._pause = pause
        self._troubled: frozenset[str] = frozenset()
        self._last = read(metrics)
        self._last_at = clock.monotonic()

    async def sample(self) -> None:
        """Take one and keep it. Raises `StoreUnavailable`."""
        checks = await self._believed()
        await self._keep(await self._ask_gauges(), checks)

    async def close(self) -> None:
        """Keep what was counted since the last sample, if that is quick; it asks no server. Never raises."""
        with suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._keep(Gauges(), None)

    async def _believed(self) -> Mapping[str, ReadinessCheck]:
        """Readiness; asked again before something that was well is believed not to be."""
        checks = await self._ask_readiness()
        if not _troubled(checks) <= self._troubled:
            await self._pause(ASK_AGAIN_S)
            checks = await self._ask_readiness()
        self._troubled = _troubled(checks)
        return checks

    async def _keep(self, gauges: Gauges, checks: Mapping[str, ReadinessCheck] | None) -> None:
        reading, at = read(self._metrics), self._clock.monotonic()
        counted, seconds = reading - self._last, at - self._last_at
        before = self._last, self._last_at
        # Now, not after the write: a write that is cancelled may have been committed, and must not count twice.
        self._last, self._last_at = reading, at
        sample = Sample(
            at_ms=self._clock.now_ms(),
            process=self._process.name,
            role=self._process.role,
            seconds=round(seconds, 3),
            counts=dict(counted),
            gauges=gauges,
            looks=looks_of(checks) if checks is not None else {},
            stopped=checks is None,
            registry=self._process.registry,
        )
        try:
            await self._store.keep(sample)
        except Exception:
            self._last, self._last_at = before
            raise


def _troubled(checks: Mapping[str, ReadinessCheck]) -> frozenset[str]:
    return frozenset(name for name, check in checks.items() if not check.ok)
