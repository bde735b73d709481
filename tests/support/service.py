"""One process of the service over a database and a cache, with gates that stop it at chosen places.

`app.bootstrap` builds it; the tests replace its clock, its cache, its source of values and its randomness. Two of them
over one database and one server behave as two processes: they share nothing else. Time passes only when a test says so,
or during the wait after an owed invalidation. That is the hardest case for the trust gate: a check stays valid as long
as possible. Owed invalidations are not settled in the background.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from app.bootstrap.service import Edges, OpenCache, OpenService, open_service
from app.errors import CacheUnavailable
from app.events.ports import Appended
from app.features.clock import Clock
from app.features.contract import Contract
from app.features.events import TipEvent
from app.features.registry import Registry
from app.features.schema import mirror_of
from app.profiles.online.cache_protocol import FeatureValue, Profile, decode
from app.profiles.online.local_cache import LocalCache
from app.profiles.ports import Cell, ComputeRow, Source
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.stores.sql.cache_state import register_server
from app.stores.sql.database import Database
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.registration import HOLD_BACK_S as REGISTERED_HOLD_BACK_S
from app.stores.valkey.registration import REGISTER_EVERY_S, ServerRegistration
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.pause_points import DEADLINE_S, PausableCache, PausableSource, turn
from tests.support.registry import REGISTRY

READERS = 2
NEAR_USERS = 100
NEAR_AFTER = 3  # plain reads after which the local cache holds a profile: computed, seen, kept
TIMEOUT_MS = 5_000  # so long that a busy machine does not look like a server that does not answer
LEASE_MS = 60_000
_processes = itertools.count(1)

Features = dict[str, object]


def let_pass(clock: FakeClock, seconds: float) -> None:
    """Advance the monotonic clock, but not the wall clock that features count from."""
    now_ms = clock.now_ms()
    clock.advance(math.ceil(seconds * 1000))
    clock.step_to(now_ms)


class PausableService:
    """An open service, its gates, and shorthands for what tests do with it."""

    def __init__(self, service: OpenService, clock: FakeClock, source: PausableSource, pauses: list[float]) -> None:
        assert isinstance(service.cache, PausableCache)
        self.inner = service
        self.clock = clock
        self.cache = service.cache
        self.source = source
        self.pauses = pauses
        self.database = service.database
        self.owed = service.invalidator.owed
        self.metrics = service.metrics
        self.registry = service.registry
        self.reader = service.reader
        self.computation = service.computation
        self.invalidator = service.invalidator
        self.rebuilder = service.rebuilder
        self.ingestor = service.ingestor

    @property
    def caches_locally(self) -> bool:
        return self.inner.reader.local_cache is not None

    @property
    def near(self) -> LocalCache:
        assert self.inner.reader.local_cache is not None
        return self.inner.reader.local_cache

    async def profile(self, user_id: str, mask: int | None = None) -> Profile:
        return (await self.reader.read({user_id: mask or self.registry.full_mask}))[user_id]

    async def features(self, user_id: str) -> Features:
        """Read one user; feature name to value."""
        return self.decoded(await self.profile(user_id))

    async def plain(self, user_id: str) -> Features:
        """Read one user as a recommender does: values only, from the local cache if it holds them."""
        values = (await self.reader.read_values({user_id: self.registry.full_mask}))[user_id]
        return dict(zip(self.registry.names, map(json.loads, values), strict=True))

    async def batch(self, user_ids: Iterable[str]) -> dict[str, Features]:
        profiles = await self.reader.read(dict.fromkeys(user_ids, self.registry.full_mask))
        return {user_id: self.decoded(profile) for user_id, profile in profiles.items()}

    async def rebuild(self, *user_ids: str) -> dict[str, Features]:
        profiles = await self.rebuilder.rebuild(user_ids, self.registry.full_mask)
        await self.inner.clear_local_caches()
        return {user_id: self.decoded(profile) for user_id, profile in profiles.items()}

    async def erase(self, user_id: str) -> None:
        """Erase the rows and cached values of a user."""
        await self.inner.users.erase(user_id, self.clock.now_ms())
        await self.invalidator.settle_now()

    async def switch(self, feature: str, *, on: bool) -> None:
        """Disable or enable a feature, as an admin does. This process knows it when this returns."""
        await self.inner.registries.switch(feature, "ada", "it is wrong", self.clock.now_ms(), on=on)

    async def send(self, *events: TipEvent) -> Appended:
        """Ingest; returns when the events are acknowledged."""
        return await self.ingestor.ingest(events)

    async def recomputed(self, user_id: str) -> Features:
        """The values that the feature SQL gives now, without the cache, the trust gate and the single flight."""
        asked = [ComputeRow(user_id, self.registry.full_mask)]
        snapshot = await self.source.inner.compute(self.clock.now_ms(), asked)
        values = (
            entry.default if raw is None else raw for entry, raw in zip(self.registry, snapshot.rows[0], strict=True)
        )
        return dict(zip(self.registry.names, values, strict=True))

    async def held(self, *user_ids: str) -> dict[Cell, bytes | None]:
        """The bytes that the cache holds for users now."""
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
        """Open all gates."""
        self.source.go()
        self.cache.go()

    def decoded(self, profile: Mapping[int, FeatureValue]) -> Features:
        """Feature name to value."""
        return {self.registry.names[index]: json.loads(reading.json) for index, reading in profile.items()}

    def counted(self, name: str, **labels: str) -> float:
        """The value of the counter `profiles_<name>_total`."""
        return self.metrics.collectors.get_sample_value(f"profiles_{name}_total", labels) or 0.0

    @property
    def statements(self) -> float:
        """The number of statements that computed features."""
        return self.metrics.collectors.get_sample_value("profiles_computation_seconds_count") or 0.0


@asynccontextmanager
async def open_gated(
    store: Path | PostgresUrl,
    open_cache: OpenCache,
    clock: FakeClock,
    registry: Registry = REGISTRY,
    local_cache: type[LocalCache] = LocalCache,
    **chosen: Any,
) -> AsyncIterator[PausableService]:
    """Open one process over a migrated database, with settings by keyword."""
    pauses: list[float] = []
    sources: list[PausableSource] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        let_pass(clock, seconds)
        await turn(0.001)

    def gated(source: Source) -> PausableSource:
        sources.append(PausableSource(source))
        return sources[-1]

    edges = Edges(
        clock=clock,
        random=Random(7),
        pause=pause,
        open_cache=open_cache,
        wrap_source=gated,
        local_cache=local_cache,
        settles=False,
    )
    settings = Settings(database=store, readers=READERS, near_users=NEAR_USERS, **chosen)
    contract = Contract(registry=registry, mirror=mirror_of(registry))
    async with open_service(settings, door="http", contract=contract, edges=edges) as service:
        opened = PausableService(service, clock, sources[0], pauses)
        try:
            yield opened
        finally:
            opened.go()


def over(
    url: str,
    *,
    timeout_ms: int = TIMEOUT_MS,
    lease_ms: int = LEASE_MS,
    kind: type[ValkeyCache] = ValkeyCache,
    nonce: Callable[[], bytes] | None = None,
) -> OpenCache:
    """Opens the cache of a process that reaches a server by `url`. Nonces are numbered and unique within a run."""
    process = next(_processes)
    numbers = itertools.count(1)

    @asynccontextmanager
    async def opened(_: Settings, database: Database, clock: Clock, metrics: Metrics) -> AsyncIterator[PausableCache]:
        assert isinstance(clock, FakeClock)

        async def pause(seconds: float) -> None:
            let_pass(clock, seconds)

        cache = kind(
            url=url,
            timeout_ms=timeout_ms,
            lease_ms=lease_ms,
            nonce=nonce or (lambda: b"%d.%d" % (process, next(numbers))),
            clock=clock,
            metrics=metrics,
            registration=ServerRegistration(database.state, partial(register_server, database), clock, pause),
        )
        try:
            await cache.open()
            let_pass(clock, REGISTERED_HOLD_BACK_S)  # so that no DEL waits for it
            yield PausableCache(cache)
        finally:
            await cache.close()

    return opened


async def assert_reads(services: Sequence[PausableService], *user_ids: str) -> None:
    """Assert that reads in every process equal a recomputation. The first read may be answered from the cache."""
    for service in services:
        await service.drain()
    for user_id in user_ids:
        for service in services:
            expected = await service.recomputed(user_id)
            found = await service.features(user_id)
            assert found == expected, f"a read of {user_id!r} differs from a recomputation"
            await service.drain()
            for _ in range(NEAR_AFTER):
                assert await service.plain(user_id) == expected, (
                    f"a plain read of {user_id!r} differs from a recomputation"
                )
    for service in services:
        await service.drain()


async def assert_true(services: Sequence[PausableService], *user_ids: str) -> None:
    """Assert that reads in every process, and all values in the cache, equal a recomputation."""
    await assert_reads(services, *user_ids)
    for service in services:
        fingerprints = {entry.name: entry.fingerprint.encode() for entry in service.registry}
        for cell, raw in (await service.held(*user_ids)).items():
            value = decode(raw)
            if value is not None and value.fingerprint == fingerprints[cell.feature]:
                expected = await service.recomputed(cell.user_id)
                assert json.loads(value.json) == expected[cell.feature], f"{cell} holds {raw!r}"
