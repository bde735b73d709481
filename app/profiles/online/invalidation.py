"""Deletes the cache keys that an event made stale, or records in the database that the deletion is *owed*.

An owed deletion is *settled*, that is made, as soon as the cache answers. While it is owed, no process serves cached
values of users in the same hash slot (`app.profiles.online.cache_protocol.TrustGate`). If some nodes of a cluster do
not answer, deletions are owed only to the users of these nodes.

Invariant: `invalidate` returns only when the DEL is confirmed, or when the owed invalidation is committed and no
process trusts the cache any more because of a query that ran before the commit. So a client whose event was
acknowledged never reads a value from before the event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress

import msgspec

from app.concurrency.tasks import repeat
from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.ids import hash_slot
from app.profiles.online.cache_protocol import HOLD_BACK_S, decode
from app.profiles.ports import UNAVAILABLE, Cache, Cell, OwedInvalidations
from app.telemetry import Metrics, logger

SETTLE_CHUNK = 200
SETTLE_EVERY_S = 0.5
RETRY_AFTER_S = 0.1
log = logger("profiles.invalidate")

# Names of features by user id.
Stale = Mapping[str, Collection[str]]


class Invalidator(msgspec.Struct, kw_only=True, eq=False):
    """Deletes stale cache keys, or records them as owed. Setting `wake` makes `keep_settling` run without delay."""

    cache: Cache
    owed: OwedInvalidations
    clock: Clock
    metrics: Metrics
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    wake: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    async def invalidate(self, stale: Stale) -> bool:
        """Delete cached values, after the commit that made them stale. Return True if the keys are deleted; False,
        after `HOLD_BACK_S` seconds, if the cache does not answer and the invalidation is recorded as owed. Raises
        `StoreUnavailable` if neither could be done: the caller must not acknowledge its request."""
        if not stale:
            return True
        try:
            self._require_cache()
            await self.cache.drop([Cell(user_id, name) for user_id, names in stale.items() for name in names])
        except CacheUnavailable as error:
            owed = [user_id for user_id in stale if error.slots is None or hash_slot(user_id) in error.slots]
            await self.owed.owe(owed, self.clock.now_ms())
            self.metrics.invalidations.labels("owed").inc(len(owed))
            self.metrics.invalidations.labels("dropped").inc(len(stale) - len(owed))
            log.warning("invalidation_owed", users=len(owed), error=str(error))
            await self._hold_back()
            return False
        self.metrics.invalidations.labels("dropped").inc(len(stale))
        return True

    async def settle_now(self) -> None:
        """Delete the cache keys of all owed invalidations. If the cache does not answer, return after `HOLD_BACK_S`.
        Raises `StoreUnavailable`."""
        try:
            await self.settle()
        except CacheUnavailable as error:
            log.warning("invalidation_owed", users=1, error=str(error))
            await self._hold_back()

    def _require_cache(self) -> None:
        if not self.cache.available:
            raise CacheUnavailable("no cache is set, or it did not answer a moment ago")

    async def _hold_back(self) -> None:
        self.wake.set()
        # A check that began just before the commit is valid for 50 ms; the caller must not be answered before that.
        await self.pause(HOLD_BACK_S)

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        """Delete cached values that are older than an event. `stale` maps user id and feature name to the sequence
        number of the event. The ingest of the event has deleted the keys already, so an older value is a fault: it is
        counted and logged. Raises `CacheUnavailable`."""
        cells = {Cell(user_id, name): seq for user_id, names in stale.items() for name, seq in names.items()}
        if not cells:
            return
        epoch, held = await self.cache.read(list(cells))
        if UNAVAILABLE in held:
            raise CacheUnavailable("some nodes of the cache do not answer")
        old = [
            (cell, raw)
            for (cell, seq), raw in zip(cells.items(), held, strict=True)
            if raw is not None and (value := decode(raw)) is not None and value.is_stale(seq)
        ]
        if old:
            dropped = await self.cache.drop_exactly(epoch, old)
            self.metrics.stale_dropped.inc(dropped)
            log.warning("stale_values_dropped", values=dropped)

    async def settle(self) -> int:
        """Delete the cache keys of all users with an owed invalidation, and then the records; return their number.
        Raises `StoreUnavailable`, or `CacheUnavailable` if records are left."""
        total = 0
        failure: CacheUnavailable | None = None
        failed: frozenset[int] = frozenset()
        while True:
            rows, features = await self.owed.pending(SETTLE_CHUNK, failed)
            if not rows:
                break
            self._require_cache()
            users = {row.user_id for row in rows}
            # Rows are deleted after the DEL and by id, so a row recorded meanwhile for the same user stays.
            try:
                await self.cache.drop([Cell(user_id, name) for user_id in users for name in features])
            except CacheUnavailable as error:
                if error.slots is None:
                    raise
                failure, slots = error, error.slots
                left = {row.slot for row in rows if hash_slot(row.user_id) in slots}
                failed |= slots | left
                rows = [row for row in rows if hash_slot(row.user_id) not in slots]
            await self.owed.settled([row.id for row in rows])
            self.metrics.invalidations.labels("settled").inc(len({row.user_id for row in rows}))
            total += len(rows)
        if failure is not None:
            raise failure
        self.metrics.owed.set(0)
        return total

    async def keep_settling(self) -> None:
        """Delete the keys of owed invalidations every `SETTLE_EVERY_S`, until cancelled."""
        await repeat("owed_invalidations", self._settle_if_owed, SETTLE_EVERY_S, self._rest)

    async def _settle_if_owed(self) -> None:
        self.wake.clear()
        try:
            if not await self.owed.any_owed():
                self.metrics.owed.set(0)
                return
            log.info("owed_invalidations_settled", rows=await self.settle())
        except Exception:
            self.wake.set()  # try again soon
            raise

    async def _rest(self, seconds: float) -> None:
        if self.wake.is_set():
            await self.pause(RETRY_AFTER_S)
            return
        # Not wait_for: until Python 3.12 it loses a cancellation that comes as the event is set.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wake.wait()
