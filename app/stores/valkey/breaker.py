"""The circuit breaker of the cache.

Commands are sent while the circuit is closed. The circuit opens after `TRIP_AFTER` failures in a row. Requests then no
longer wait for timeouts, and a background task probes the server. The first answer closes the circuit again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from app.concurrency.tasks import end
from app.errors import CacheUnavailable
from app.telemetry import Metrics, logger

TRIP_AFTER = 3
PROBE_EVERY_S = 0.2
log = logger("stores.valkey")


class CircuitBreaker(msgspec.Struct, eq=False):
    """Takes a cache server out of use after failures, and back into use when the server answers. `probe` sends a
    command to the server, and must raise `CacheUnavailable` if there is no answer."""

    probe: Callable[[], Awaitable[None]]
    metrics: Metrics
    failures: int = 0  # in a row; a caller whose command was answered sets it to 0
    closed: bool = True
    _probing: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.metrics.cache_available.set(1)

    def failed(self) -> None:
        self.failures += 1
        if self.closed and self.failures >= TRIP_AFTER:
            self.trip()

    def trip(self) -> None:
        """Open the circuit, and probe the server in the background until it answers."""
        if not self.closed:
            return
        self.closed = False
        self.metrics.cache_available.set(0)
        log.warning("cache_circuit_opened")
        self._probing = asyncio.get_running_loop().create_task(self._probe_until_answered())

    async def close(self) -> None:
        if self._probing is not None:
            await end([self._probing])

    async def _probe_until_answered(self) -> None:
        while True:
            try:
                await self.probe()
                break
            except CacheUnavailable as error:
                log.debug("cache_probe_failed", error=str(error))
            except Exception:  # a defect must not keep the circuit open
                log.exception("cache_probe_failed")
            await asyncio.sleep(PROBE_EVERY_S)
        self.failures = 0
        self.closed = True
        self.metrics.cache_available.set(1)
        log.info("cache_circuit_closed")
