"""One process of the service, wired over a SQLite file and a cache, with places to stop it.

Two of them over one file and one server are two processes, as far as the protocol goes: they share nothing else. Their
clock is the test's. Time passes only where the test or the hold-back of an owed invalidation says so, which is the
hardest case for the trust gate: a look stays valid as long as it can.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

from app.errors import CacheUnavailable
from app.events.admission import Admission
from app.events.ingest import Ingestor, Receipt
from app.features.events import TipEvent
from app.features.registry import Registry
from app.profiles.availability import FeatureAvailability
from app.profiles.codec import decode
from app.profiles.online.compute import Computation
from app.profiles.online.fill import Filler, Profile, Reading
from app.profiles.online.invalidation import Invalidator
from app.profiles.online.local_cache import LocalCache
from app.profiles.online.reader import ProfileReader
from app.profiles.online.trust import TrustGate
from app.profiles.ports import Cache, Cell, ComputeRow
from app.profiles.rebuild.rebuilder import Rebuilder
from app.stores.sqlite.change_feed import SqliteChangeFeed
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.local_cache_epoch import recall
from app.stores.sqlite.owed_invalidations import SqliteOwedInvalidations, announce
from app.stores.sqlite.registries import SqliteRegistries
from app.stores.sqlite.source import SqliteSource
from app.stores.sqlite.users import SqliteUsers
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.server_registration import HOLD_BACK_S as REGISTERED_HOLD_BACK_S
from app.stores.valkey.server_registration import REGISTER_EVERY_S, ServerRegistration
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.gates import DEADLINE_S, GatedCache, GatedSource, turn
from tests.support.registry import REGISTRY

READERS = 2
NEAR_USERS = 100
NEAR_AFTER = 3  # plain reads after which a profile is kept near, where it may be: computed, seen, kept
TIMEOUT_MS = 5_000  # an unresponsive server is the subject of few tests; a busy machine must not look like one
LEASE_MS = 60_000
_processes = itertools.count(1)

Features = dict[str, object]
MakeCache = Callable[[Database, SqliteOwedInvalidations, FakeClock, Metrics], ValkeyCache]


def let_pass(clock: FakeClock, seconds: float) -> None:
    """Time passes, as the wall clock does not show: what counts as now in features stays."""
    now_ms = clock.now_ms()
    clock.advance(math.ceil(seconds * 1000))
    clock.step_to(now_ms)


class Service:
    """The parts of one process."""

    def __init__(
        self,
        *,
        database: Database,
        owed: SqliteOwedInvalidations,
        cache: Cache,
        clock: FakeClock,
        metrics: Metrics,
        registry: Registry,
    ) -> None:
        self.database = database
        self.clock = clock
        self.metrics = metrics
        self.registry = registry
        self.plain_source = SqliteSource(database, registry)
        self.source = GatedSource(self.plain_source)
        self.cache = GatedCache(cache)
        self.owed = owed
        self.pauses: list[float] = []
        self.invalidator = Invalidator(
            cache=self.cache, owed=self.owed, clock=clock, metrics=metrics, pause=self._pause
        )
        self.gate = TrustGate(self.owed.any_owed, clock, self.invalidator.wake)
        self.availability = FeatureAvailability(registry, clock, owed.disabled)
        self.computation = Computation(self.source, registry, clock, metrics, READERS, self.availability)
        self.filler = Filler(self.cache, registry, Random(7), metrics)
        self.near = LocalCache(SqliteChangeFeed(owed.data_version), registry, clock, NEAR_USERS)
        self.reader = ProfileReader(
            cache=self.cache,
            gate=self.gate,
            computation=self.computation,
            filler=self.filler,
            registry=registry,
            metrics=metrics,
            near=self.near,
        )
        self.rebuilder = Rebuilder(
            cache=self.cache,
            computation=self.computation,
            filler=self.filler,
            registry=registry,
            invalidate=self.invalidator.invalidate,
        )
        self.ingestor = Ingestor(
            log=SqliteEventLog(database),
            invalidator=self.invalidator,
            publisher=None,
            admission=Admission(180),
            clock=clock,
            metrics=metrics,
            door="http",
        )

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        let_pass(self.clock, seconds)
        await turn(0.001)

    async def profile(self, user_id: str, mask: int | None = None) -> Profile:
        """Read one user."""
        return (await self.reader.read({user_id: mask or self.registry.full_mask}))[user_id]

    async def features(self, user_id: str) -> Features:
        """Read one user; name to value."""
        return self.decoded(await self.profile(user_id))

    async def plain(self, user_id: str) -> Features:
        """Read one user as a recommender does: only the values, from this process's memory where they are there."""
        values = (await self.reader.read_values({user_id: self.registry.full_mask}))[user_id]
        return dict(zip(self.registry.names, map(json.loads, values), strict=True))

    async def batch(self, user_ids: Iterable[str]) -> dict[str, Features]:
        """Read many users."""
        profiles = await self.reader.read(dict.fromkeys(user_ids, self.registry.full_mask))
        return {user_id: self.decoded(profile) for user_id, profile in profiles.items()}

    async def rebuild(self, *user_ids: str) -> dict[str, Features]:
        """Rebuild users; what the rebuild answers."""
        profiles = await self.rebuilder.rebuild(user_ids, self.registry.full_mask)
        await recall(self.database)
        return {user_id: self.decoded(profile) for user_id, profile in profiles.items()}

    async def erase(self, user_id: str) -> None:
        """Erase a user."""
        await SqliteUsers(self.database).erase(user_id, self.clock.now_ms())
        await self.invalidator.make_good()

    async def switch(self, feature: str, *, on: bool) -> None:
        """Disable or enable a feature, as an admin does; this process has looked since."""
        registries = SqliteRegistries(self.database)
        await registries.switch(feature, "ada", "it is wrong", self.clock.now_ms(), on=on)
        self.owed.any_owed()

    async def send(self, *events: TipEvent) -> Receipt:
        """Ingest; returns when the events are acknowledged."""
        return await self.ingestor.ingest(events)

    async def recomputed(self, user_id: str) -> Features:
        """The truth: the same SQL past cache, gate and sharing."""
        asked = [ComputeRow(user_id, self.registry.full_mask)]
        snapshot = await self.plain_source.compute(self.clock.now_ms(), asked)
        values = (
            entry.default if raw is None else raw for entry, raw in zip(self.registry, snapshot.rows[0], strict=True)
        )
        return dict(zip(self.registry.names, values, strict=True))

    async def held(self, *user_ids: str) -> dict[Cell, bytes | None]:
        """What the cache holds for users now, in bytes."""
        cells = [Cell(user_id, name) for user_id in user_ids for name in self.registry.names]
        _, held = await self.cache.inner.read(cells)
        return dict(zip(cells, held, strict=True))

    async def reconnected(self) -> None:
        """Return when the cache is used again: breaker closed, connected, and its server registered."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await self.held("nobody")
                except CacheUnavailable:
                    let_pass(self.clock, REGISTER_EVERY_S)
                    await turn(0.002)
                else:
                    if self.cache.available:
                        return
                    await turn(0.002)

    async def drain(self) -> None:
        """Return when background fills have been answered."""
        await self.reader.close()

    def go(self) -> None:
        """Let whatever is stopped go on."""
        self.source.go()
        self.cache.go()

    async def close(self) -> None:
        """As a process shuts down; not the cache, which was handed in."""
        self.go()
        await self.reader.close()
        await self.ingestor.close()

    def decoded(self, profile: Mapping[int, Reading]) -> Features:
        """Name to value."""
        return {self.registry.names[index]: json.loads(reading.json) for index, reading in profile.items()}

    def counted(self, name: str, **labels: str) -> float:
        """A counter of this process."""
        return self.metrics.collectors.get_sample_value(f"profiles_{name}_total", labels) or 0.0

    @property
    def statements(self) -> float:
        """How many statements computed features."""
        return self.metrics.collectors.get_sample_value("profiles_computation_seconds_count") or 0.0


@asynccontextmanager
async def open_service(
    path: Path, make_cache: MakeCache, clock: FakeClock, registry: Registry = REGISTRY
) -> AsyncIterator[Service]:
    """One process over a migrated database."""
    async with AsyncExitStack() as stack:
        database = await Database.open(path, READERS)
        stack.push_async_callback(database.close)
        metrics = Metrics()
        await announce(database, registry, clock.now_ms())
        owed = SqliteOwedInvalidations(database)
        stack.callback(owed.close)
        cache = make_cache(database, owed, clock, metrics)
        stack.push_async_callback(cache.close)
        await cache.open()
        let_pass(clock, REGISTERED_HOLD_BACK_S)  # so that no DEL has to wait for it
        service = Service(database=database, owed=owed, cache=cache, clock=clock, metrics=metrics, registry=registry)
        stack.push_async_callback(service.close)
        yield service


def over(
    url: str,
    *,
    timeout_ms: int = TIMEOUT_MS,
    lease_ms: int = LEASE_MS,
    kind: type[ValkeyCache] = ValkeyCache,
    nonce: Callable[[], bytes] | None = None,
) -> MakeCache:
    """Makes the cache of a process that reaches a server by `url`. Nonces are numbered, unique within a run."""
    process = next(_processes)
    numbers = itertools.count(1)

    def make(database: Database, owed: SqliteOwedInvalidations, clock: FakeClock, metrics: Metrics) -> ValkeyCache:
        async def pause(seconds: float) -> None:
            let_pass(clock, seconds)

        return kind(
            url=url,
            database_id=database.id,
            timeout_ms=timeout_ms,
            lease_ms=lease_ms,
            nonce=nonce or (lambda: b"%d.%d" % (process, next(numbers))),
            clock=clock,
            metrics=metrics,
            registration=ServerRegistration(owed.registration, clock, pause),
        )

    return make


async def assert_reads(services: Sequence[Service], *user_ids: str) -> None:
    """Reads in every process equal a recomputation.

    The first read of each process may still be answered from the cache as it was left; that is the point.
    """
    for service in services:
        await service.drain()
    for user_id in user_ids:
        for service in services:
            expected = await service.recomputed(user_id)
            found = await service.features(user_id)
            assert found == expected, f"a read of {user_id!r} is not the truth"
            await service.drain()
            for _ in range(NEAR_AFTER):
                assert await service.plain(user_id) == expected, f"a plain read of {user_id!r} is not the truth"
    for service in services:
        await service.drain()


async def assert_true(services: Sequence[Service], *user_ids: str) -> None:
    """Reads in every process equal a recomputation, and whatever value stands in the cache is right."""
    await assert_reads(services, *user_ids)
    for service in services:
        fingerprints = {entry.name: entry.fingerprint.encode() for entry in service.registry}
        for cell, raw in (await service.held(*user_ids)).items():
            value = decode(raw)
            if value is not None and value.fingerprint == fingerprints[cell.feature]:
                expected = await service.recomputed(cell.user_id)
                assert json.loads(value.json) == expected[cell.feature], f"{cell} holds {raw!r}"
