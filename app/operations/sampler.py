"""Samples this process: stores what it has counted since the last sample, and the component states that it sees.

Invariants: counts that could not be stored are part of the next sample, and nothing is counted twice; a component's
state becomes worse only after a check has failed twice, a second apart.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import msgspec

from app.errors import Unavailable
from app.features.clock import Clock
from app.operations.component_states import ReadinessCheck, component_views
from app.operations.samples import Gauges, Role, Sample, SampleStore, read
from app.telemetry import Metrics

EVERY_S = 10.0
LAST_S = 0.3
ASK_AGAIN_S = 1.0


class Sampler(msgspec.Struct, kw_only=True):
    """`process` is a random name, new at every start; `registry` is the fingerprint of the registry that is served."""

    role: Role
    process: str
    registry: str
    metrics: Metrics
    store: SampleStore
    ask_gauges: Callable[[], Awaitable[Gauges]]
    ask_readiness: Callable[[], Awaitable[Mapping[str, ReadinessCheck]]]
    clock: Clock
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    _failing: frozenset[str] = frozenset()
    _last: Counter[str] = msgspec.field(default_factory=Counter)
    _last_at: float = 0.0

    def __post_init__(self) -> None:
        self._last, self._last_at = read(self.metrics), self.clock.monotonic()

    async def sample(self) -> None:
        """Take a sample and store it; called every `EVERY_S` seconds.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        checks = await self._confirmed_readiness()
        await self._keep(await self.ask_gauges(), checks)

    async def close(self) -> None:
        """Store the last sample, with counts only, within `LAST_S` seconds. Failures to store it are ignored."""
        with suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._keep(Gauges(), None)

    async def _confirmed_readiness(self) -> Mapping[str, ReadinessCheck]:
        """Run the readiness checks, and repeat them after `ASK_AGAIN_S` seconds if one fails that passed before."""
        checks = await self.ask_readiness()
        if not _failing(checks) <= self._failing:
            await self.pause(ASK_AGAIN_S)
            checks = await self.ask_readiness()
        self._failing = _failing(checks)
        return checks

    async def _keep(self, gauges: Gauges, checks: Mapping[str, ReadinessCheck] | None) -> None:
        reading, at = read(self.metrics), self.clock.monotonic()
        counted, seconds = reading - self._last, at - self._last_at
        before = self._last, self._last_at
        # Set before the write: if the write is cancelled, it may have been committed, and must not be counted twice.
        self._last, self._last_at = reading, at
        sample = Sample(
            at_ms=self.clock.now_ms(),
            process=self.process,
            role=self.role,
            seconds=round(seconds, 3),
            counts=dict(counted),
            gauges=gauges,
            components=component_views(checks) if checks is not None else {},
            stopped=checks is None,
            registry=self.registry,
        )
        try:
            await self.store.keep(sample)
        except Exception:
            self._last, self._last_at = before
            raise


def _failing(checks: Mapping[str, ReadinessCheck]) -> frozenset[str]:
    return frozenset(name for name, check in checks.items() if not check.ok)
