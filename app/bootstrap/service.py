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

from app.bootstrap.contract import load_contract
from app.bootstrap.engines import open_engine
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
from app.features.registry import Registry
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


class OpenService(Service, frozen=True, kw_only=True):
    """A `Service` together with the adapters that it runs on, for entry points, commands and tests."""

    database: Database
    cache: Cache
    queue: Queue | None
    users: SqlUsers
    registries: SqlRegistries
    audit_trail: SqlAuditTrail
    tracing: Tracing | None


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


@asynccontextmanager
async def open_service(  # noqa: PLR0915  # one graph, readable from top to bottom
    settings: Settings, *, door: str, contract: Contract | None = None, edges: Edges | None = None
) -> AsyncIterator[OpenService]:
    """Open all adapters and services of a process, and close them in the reverse order when the block ends.

    `door` is the entry point through which events come: `http`, `queue` or `command`. It labels the ingest metrics.
    With `http` there is a local cache on SQLite; with `http` and `queue` the database records that this process serves
    the registry. Without a cache URL, reads compute, and invalidations are stored until a cache accepts them. Without a
    queue URL, events wait for a worker's sweep.

    Raises `SettingsError`, `RegistryError`, `SchemaMismatch` or `StoreUnavailable` if the process cannot start.
    """
    contract, edges, metrics = contract or load_contract(settings), edges or Edges(), Metrics()
    registry, clock = contract.registry, edges.clock
    metrics.export_faults_as_zero(registry.names, get_args(Fault))

    async with AsyncExitStack() as stack:
        traced: Wrap = untraced
        if (tracing := open_tracing(settings, door)) is not None:
            stack.push_async_callback(tracing.close)
            traced = tracing.port
        # 1. The database.
        engine = await stack.enter_async_context(open_engine(settings))
        database = engine.database
        # A commit is shared by the requests of its events.
        sharing = {"append": lambda requests: [item.traceparent for events in requests for item in events]}
        event_log = traced("event_log", engine.event_log, sharing)
        await engine.check_features(registry)
        await database.state.query()  # which features are disabled
        owed, users = SqlOwedInvalidations(database), SqlUsers(database)
        logged_profiles, cutoffs = SqlLoggedProfiles(database), SqlCutoffs(database)
        dead_letters, rebuild_runs = traced("dead_letters", SqlDeadLetters(database)), SqlRebuildRepository(database)
        registries = SqlRegistries(database)
        availability = FeatureAvailability(registry, clock, lambda: database.state.last.disabled)
        sql_source = engine.source(registry, settings.readers)
        trial = (sql_source, registry, users, registries, clock, availability)
        costs = await _try_features(*trial) if door in ROLES else {}
        await announce(database, registry, clock.now_ms())
        if door in ROLES:
            await registries.announce(registry, clock.now_ms())

        # 2. The servers.
        if (queue := open_queue(settings, metrics)) is not None:
            stack.push_async_callback(queue.close)
        opened = await stack.enter_async_context(edges.open_cache(settings, database, clock, metrics))
        cache = traced("cache", opened)

        # 3. Reads.
        source = traced("source", edges.wrap_source(sql_source))
        invalidator = Invalidator(cache=cache, owed=owed, clock=clock, metrics=metrics, pause=edges.pause)
        trust_gate = TrustGate(traced("state", database.state), clock, invalidator.wake.set, replaced_slots)
        computation = Computation(source, registry, clock, metrics, settings.readers, edges.random, availability)
        filler = Filler(cache, registry, metrics)
        local_cache = None
        if door == "http" and settings.near_users and engine.change_feed is not None:
            local_cache = edges.local_cache(engine.change_feed(), registry, clock, settings.near_users)
        profile_reader = ProfileReader(
            cache=cache, gate=trust_gate, computation=computation, filler=filler, local_cache=local_cache
        )
        stack.push_async_callback(profile_reader.close)
        reader = traced("reader", profile_reader)
        inspector = Inspector(filler=filler, distrusted=trust_gate.distrusted, users=users, computation=computation)
        rebuilder = Rebuilder(computation=computation, filler=filler, invalidate=invalidator.invalidate)
        clear_caches = partial(clear_local_caches, database)

        async def moments() -> Moments:
            return Moments(registry, settings.retention_days, clock, await cutoffs.deleted_before("events"))

        async def drop(stale: Stale) -> None:
            await invalidator.invalidate(stale)
            await clear_caches()

        # 4. Decisions and events.
        scoring = None
        if settings.scoring:
            # Imported here because a service that only answers profiles imports nothing of the bandit.
            from app.bootstrap.bandit import bandit  # noqa: PLC0415

            scoring = bandit(settings, database, reader.read_recorded, clock, metrics, traced=traced)
            stack.push_async_callback(scoring.scorer.close)
        event_ingestor = Ingestor(
            log=event_log,
            invalidator=invalidator,
            # A worker consumes the events of its own jobs, so it publishes nothing.
            publish=queue.publish if queue is not None and door != "queue" else None,
            retention_days=settings.retention_days,
            clock=clock,
            metrics=metrics,
            door=door,
        )
        stack.push_async_callback(event_ingestor.close)
        ingestor = traced("ingestor", event_ingestor)
        consumer = Consumer(
            log=event_log,
            letters=dead_letters,
            invalidator=invalidator,
            learners=[scoring.learner.learn] if scoring is not None else [],
            clock=clock,
            metrics=metrics,
            tracing=tracing.consuming if tracing is not None else nullcontext,
        )

        # 5. Admins' and workers' tasks.
        quality = DataQuality(inspector=inspector, random=edges.random, runs=SqlQualityRepository(database))
        health = HealthChecks(
            database=database,
            cache=cache,
            queue=queue,
            computation=computation,
            rollout=scoring and scoring.rollout,
            quality=quality,
        )
        if edges.settles and settings.cache_url:
            await stack.enter_async_context(running(invalidator.keep_settling()))
        stack.callback(database.readers.interrupt)  # runs first, since what closes next waits for running computations

        yield OpenService(
            settings=settings,
            process=secrets.token_hex(4),
            clock=clock,
            metrics=metrics,
            database=database,
            cache=cache,
            queue=queue,
            registry=registry,
            mirror=contract.mirror,
            registries=registries,
            costs=costs,
            reader=reader,
            tracing=tracing,
            computation=computation,
            invalidator=invalidator,
            rebuilder=rebuilder,
            rebuild_runs=rebuild_runs,
            rebuild_runner=RebuildRunner(runs=rebuild_runs, rebuilder=rebuilder, users=users),
            clear_local_caches=clear_caches,
            inspector=inspector,
            moments=moments,
            checker=ConsistencyChecker(inspector=inspector, drop=drop),
            decision_checker=DecisionChecker(
                logged=logged_profiles, computation=computation, pruned_before=partial(cutoffs.deleted_before, "events")
            ),
            logged_profiles=logged_profiles,
            quality=quality,
            ingestor=ingestor,
            queue_door=QueueDoor(ingestor, dead_letters),
            consumer=consumer,
            dead_letters=dead_letters,
            retention=Retention(
                {
                    "events": (event_log, settings.retention_days),
                    "decisions": (DecisionRetention(database), settings.decision_retention_days),
                },
                cutoffs,
                clock,
            ),
            users=users,
            erasure=Erasure(
                users=users,
                erase_jobs=queue.erase if queue is not None else None,
                settle=invalidator.settle_now,
                drop_cached=cache.drop_user,
                clock=clock,
            ),
            scoring=scoring,
            audit_trail=SqlAuditTrail(database),
            samples=SqlSamples(database),
            readiness=health.readiness,
            refresh_gauges=health.refresh_gauges,
            unknown_decisions=lambda: unknown_decisions(database, clock.now_ms()),
        )


async def _try_features(
    source: Source,
    registry: Registry,
    stored: SqlUsers,
    registries: SqlRegistries,
    clock: Clock,
    availability: FeatureAvailability,
) -> Mapping[int, float]:
    """Compute each enabled feature for some stored users; return the microseconds per user by index of the feature. If
    a feature fails, it is paused if a process has served this definition before, otherwise `RegistryError` is raised.
    """
    users = await stored.newest_users(SAMPLE)
    served = {feature_of(item).fingerprint for known in await registries.announced() for item in known.definitions}
    trials = await try_features(source, registry, registry.full_mask & ~availability.disabled, users, clock)
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
