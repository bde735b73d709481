"""Opens the adapters and builds the services of one process in the order of their dependencies, and closes them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from random import Random
from typing import TYPE_CHECKING, get_args

import msgspec

from app.bootstrap.engines import load_contract, open_engine
from app.bootstrap.health import HealthChecks
from app.bootstrap.servers import ROLES, Wrap, open_cache, open_queue, open_tracing, untraced
from app.concurrency.tasks import running
from app.errors import RegistryError
from app.events.consume import Consumer
from app.events.erasure import Erasure
from app.events.ingest import Ingestor
from app.events.queue_door import QueueDoor
from app.events.retention import Retention
from app.features.clock import Clock, SystemClock
from app.features.contract import Contract
from app.features.plan import feature_of
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.checker import ConsistencyChecker
from app.profiles.consistency.decisions import DecisionChecker
from app.profiles.consistency.inspection import Fault, Inspector
from app.profiles.history import Moments
from app.profiles.online.cache_protocol import Filler, TrustGate
from app.profiles.online.compute import Computation
from app.profiles.online.invalidation import Invalidator, Stale
from app.profiles.online.local_cache import LocalCache
from app.profiles.online.reader import ProfileReader
from app.profiles.ports import Cache, Source
from app.profiles.quality.measurement import DataQuality
from app.profiles.rebuild import Rebuilder, RebuildRunner
from app.profiles.trial import SAMPLE, try_features
from app.service import Service
from app.settings import Settings
from app.stores.queue.client import Queue
from app.stores.sql.access import SqlAuditTrail
from app.stores.sql.cache_state import SqlOwedInvalidations, clear_local_caches
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.logged_profiles import SqlLoggedProfiles
from app.stores.sql.quality_runs import SqlQualityRepository
from app.stores.sql.rebuilds import SqlRebuildRepository
from app.stores.sql.registries import SqlRegistries, announce
from app.stores.sql.retention import DecisionRetention, SqlCutoffs
from app.stores.sql.samples import SqlSamples, unknown_decisions
from app.stores.sql.users import SqlUsers
from app.stores.valkey.registration import replaced_slots
from app.telemetry import Metrics, logger

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

log = logger("bootstrap")

OpenCache = Callable[[Settings, Database, Clock, Metrics], AbstractAsyncContextManager[Cache]]


class Edges(msgspec.Struct, frozen=True, kw_only=True):
    """Dependencies of a process that no setting names, such as the clock. Tests replace them.

    `pause` replaces `asyncio.sleep` in the invalidator. `settles`: whether invalidations that the cache did not accept
    are retried in the background; if not, the caller must retry them.
    """

    clock: Clock = msgspec.field(default_factory=SystemClock)
    random: Random = msgspec.field(default_factory=Random)
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    open_cache: OpenCache = open_cache
    wrap_source: Callable[[Source], Source] = lambda source: source
    local_cache: type[LocalCache] = LocalCache
    settles: bool = True


class OpenService(Service):
    """A `Service` together with the adapters that it runs on, for entry points, commands and tests."""

    database: Database
    cache: Cache
    queue: Queue | None
    users: SqlUsers
    registries: SqlRegistries
    audit_trail: SqlAuditTrail
    tracing: Tracing | None

    async def build(  # noqa: PLR0915  # one graph, readable from top to bottom
        self, stack: AsyncExitStack, settings: Settings, door: str, contract: Contract, edges: Edges
    ) -> None:
        """Build every part. `stack` closes the parts that were opened, even if opening a later part fails."""
        self.settings = settings
        self.process = secrets.token_hex(4)
        self.clock = clock = edges.clock
        self.metrics = metrics = Metrics()
        self.registry = registry = contract.registry
        self.mirror = contract.mirror
        metrics.export_faults_as_zero(registry.names, get_args(Fault))
        traced: Wrap = untraced
        self.tracing = open_tracing(settings, door)
        if self.tracing is not None:
            stack.push_async_callback(self.tracing.close)
            traced = self.tracing.port

        # 1. The database.
        engine = await stack.enter_async_context(open_engine(settings))
        self.database = database = engine.database
        # A commit is shared by the requests of its events.
        sharing = {"append": lambda requests: [item.traceparent for events in requests for item in events]}
        event_log = traced("event_log", engine.event_log, sharing)
        await engine.check_features(registry)
        await database.state.query()  # which features are disabled
        self.users = SqlUsers(database)
        self.registries = SqlRegistries(database)
        self.rebuild_runs = SqlRebuildRepository(database)
        self.logged_profiles = SqlLoggedProfiles(database)
        self.dead_letters = traced("dead_letters", SqlDeadLetters(database))
        self.audit_trail = SqlAuditTrail(database)
        self.samples = SqlSamples(database)
        self.unknown_decisions = lambda: unknown_decisions(database, clock.now_ms())
        self.clear_local_caches = partial(clear_local_caches, database)
        cutoffs = SqlCutoffs(database)
        availability = FeatureAvailability(registry, clock, lambda: database.state.last.disabled)
        sql_source = engine.source(registry, settings.readers)
        self.costs = await self._try_features(sql_source, availability) if door in ROLES else {}
        await announce(database, registry, clock.now_ms())
        if door in ROLES:
            await self.registries.announce(registry, clock.now_ms())

        # 2. The servers.
        self.queue = queue = open_queue(settings, metrics)
        if queue is not None:
            stack.push_async_callback(queue.close)
        opened = await stack.enter_async_context(edges.open_cache(settings, database, clock, metrics))
        self.cache = traced("cache", opened)

        # 3. Reads.
        source = traced("source", edges.wrap_source(sql_source))
        owed = SqlOwedInvalidations(database)
        self.invalidator = Invalidator(cache=self.cache, owed=owed, clock=clock, metrics=metrics, pause=edges.pause)
        trust_gate = TrustGate(traced("state", database.state), clock, self.invalidator.wake.set, replaced_slots)
        self.computation = Computation(source, registry, clock, metrics, settings.readers, edges.random, availability)
        filler = Filler(self.cache, registry, metrics)
        local_cache = None
        if door == "http" and settings.near_users and engine.change_feed is not None:
            local_cache = edges.local_cache(engine.change_feed(), registry, clock, settings.near_users)
        reader = ProfileReader(
            cache=self.cache, gate=trust_gate, computation=self.computation, filler=filler, local_cache=local_cache
        )
        stack.push_async_callback(reader.close)
        self.reader = traced("reader", reader)
        self.inspector = Inspector(
            filler=filler, distrusted=trust_gate.distrusted, users=self.users, computation=self.computation
        )
        self.rebuilder = Rebuilder(computation=self.computation, filler=filler, invalidate=self.invalidator.invalidate)

        async def moments() -> Moments:
            return Moments(registry, settings.retention_days, clock, await cutoffs.deleted_before("events"))

        self.moments = moments

        # 4. Decisions and events.
        self.scoring = None
        if settings.scoring:
            # Imported here because a service that only answers profiles imports nothing of the bandit.
            from app.bootstrap.bandit import bandit  # noqa: PLC0415

            self.scoring = bandit(settings, database, self.reader.read_recorded, clock, metrics, traced=traced)
            stack.push_async_callback(self.scoring.scorer.close)
        ingestor = Ingestor(
            log=event_log,
            invalidator=self.invalidator,
            # A worker consumes the events of its own jobs, so it publishes nothing.
            publish=queue.publish if queue is not None and door != "queue" else None,
            retention_days=settings.retention_days,
            clock=clock,
            metrics=metrics,
            door=door,
        )
        stack.push_async_callback(ingestor.close)
        self.ingestor = traced("ingestor", ingestor)
        self.queue_door = QueueDoor(self.ingestor, self.dead_letters)
        self.consumer = Consumer(
            log=event_log,
            letters=self.dead_letters,
            invalidator=self.invalidator,
            learners=[self.scoring.learner.learn] if self.scoring is not None else [],
            clock=clock,
            metrics=metrics,
            tracing=self.tracing.consuming if self.tracing is not None else nullcontext,
        )

        # 5. Admins' and workers' tasks.
        self.rebuild_runner = RebuildRunner(runs=self.rebuild_runs, rebuilder=self.rebuilder, users=self.users)
        self.checker = ConsistencyChecker(inspector=self.inspector, drop=self._drop)
        self.decision_checker = DecisionChecker(
            logged=self.logged_profiles,
            computation=self.computation,
            pruned_before=partial(cutoffs.deleted_before, "events"),
        )
        self.quality = DataQuality(inspector=self.inspector, random=edges.random, runs=SqlQualityRepository(database))
        self.retention = Retention(
            {
                "events": (event_log, settings.retention_days),
                "decisions": (DecisionRetention(database), settings.decision_retention_days),
            },
            cutoffs,
            clock,
        )
        self.erasure = Erasure(
            users=self.users,
            erase_jobs=queue.erase if queue is not None else None,
            settle=self.invalidator.settle_now,
            drop_cached=self.cache.drop_user,
            clock=clock,
        )
        health = HealthChecks(self, database, self.cache, queue)
        self.readiness = health.readiness
        self.refresh_gauges = health.refresh_gauges
        if edges.settles and settings.cache_url:
            await stack.enter_async_context(running(self.invalidator.keep_settling()))
        stack.callback(database.readers.interrupt)  # runs first, since what closes next waits for running computations

    async def _drop(self, stale: Stale) -> None:
        await self.invalidator.invalidate(stale)
        await self.clear_local_caches()

    async def _try_features(self, source: Source, availability: FeatureAvailability) -> Mapping[int, float]:
        """Compute each enabled feature for some stored users; return the microseconds per user by index of the feature.
        A failing feature is paused if a process has served its definition before; otherwise raises `RegistryError`."""
        registry, users = self.registry, await self.users.newest_users(SAMPLE)
        announced = await self.registries.announced()
        served = {feature_of(item).fingerprint for known in announced for item in known.definitions}
        trials = await try_features(source, registry, registry.full_mask & ~availability.disabled, users, self.clock)
        measured = {trial.feature: trial.us_per_user for trial in trials if trial.us_per_user is not None}
        if measured:
            shown = {registry.names[index]: round(cost) for index, cost in measured.items()}
            log.info("features_tried", users=len(users), us_per_user=shown)
        for trial in trials:
            if trial.error is None:
                continue
            entry = registry[trial.feature]
            if entry.fingerprint not in served:
                raise RegistryError(entry.name, f"a trial with {len(users)} stored users failed: {trial.error}")
            availability.pause(trial.feature, trial.user_id, trial.error, slow=trial.us_per_user is None)
        return measured


@asynccontextmanager
async def open_service(
    settings: Settings, *, door: str, contract: Contract | None = None, edges: Edges | None = None
) -> AsyncIterator[OpenService]:
    """Open all adapters and services of a process, and close them in the reverse order when the block ends.

    `door` is the entry point through which events come: `http`, `queue` or `command`. It labels the ingest metrics.
    With `http` and SQLite there is a local cache. With `http` or `queue` the database records that this process serves
    the registry. Without a cache URL, reads compute, and invalidations are stored until a cache accepts them. Without a
    queue URL, events wait for a worker's sweep.

    Raises `SettingsError`, `RegistryError`, `SchemaMismatch` or `StoreUnavailable` if the process cannot start.
    """
    service = OpenService()
    async with AsyncExitStack() as stack:
        await service.build(stack, settings, door, contract or load_contract(settings), edges or Edges())
        yield service
