"""Takes a sample of its own process every ten seconds.

Invariants: a failure of the sampler ends no loop and reaches no request. Counts that could not be stored are part of
the next sample. Nothing is counted twice. One late answer does not make a state worse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from app.errors import Unavailable
from app.features.clock import Clock
from app.operations.component_states import ReadinessCheck, component_views
from app.operations.samples import Gauges, Process, Sample, SampleStore, read
from app.telemetry import Metrics

EVERY_S = 10.0
LAST_S = 0.3
ASK_AGAIN_S = 1.0


class Sampler:
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
        self._failing: frozenset[str] = frozenset()
        self._last = read(metrics)
        self._last_at = clock.monotonic()

    async def sample(self) -> None:
        """Take a sample and store it. Raises `StoreUnavailable`."""
        checks = await self._confirmed_readiness()
        await self._keep(await self._ask_gauges(), checks)

    async def close(self) -> None:
        """Store what was counted since the last sample, within `LAST_S`. Asks no server and never raises."""
        with suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._keep(Gauges(), None)

    async def _confirmed_readiness(self) -> Mapping[str, ReadinessCheck]:
        """Readiness, asked a second time if a check fails that did not fail before."""
        checks = await self._ask_readiness()
        if not _failing(checks) <= self._failing:
            await self._pause(ASK_AGAIN_S)
            checks = await self._ask_readiness()
        self._failing = _failing(checks)
        return checks

    async def _keep(self, gauges: Gauges, checks: Mapping[str, ReadinessCheck] | None) -> None:
        reading, at = read(self._metrics), self._clock.monotonic()
        counted, seconds = reading - self._last, at - self._last_at
        before = self._last, self._last_at
        # Before the write, not after it: a cancelled write may have been committed, and must not count twice.
        self._last, self._last_at = reading, at
        sample = Sample(
            at_ms=self._clock.now_ms(),
            process=self._process.name,
            role=self._process.role,
            seconds=round(seconds, 3),
            counts=dict(counted),
            gauges=gauges,
            components=component_views(checks) if checks is not None else {},
            stopped=checks is None,
            registry=self._process.registry,
        )
        try:
            await self._store.keep(sample)
        except Exception:
            self._last, self._last_at = before
            raise


def _failing(checks: Mapping[str, ReadinessCheck]) -> frozenset[str]:
    return frozenset(name for name, check in checks.items() if not check.ok)
