"""Joins the parts of one process: what the API, the worker and the command line have in common.

Knows every adapter and no HTTP. Each process opens one `Service` and closes it; while it is open, it settles owed
invalidations in the background.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random

from app.bootstrap.bandit import bandit
from app.bootstrap.bandit_parts import Bandit
from app.bootstrap.contract import Contract, check_contract, load_contract
from app.bootstrap.servers import named_cache, named_queue
from app.concurrency.tasks import end
from app.errors import RegistryError
from app.events.admission import Admission
from app.events.consume import Consumer
from app.events.ingest import Ingestor
from app.events.ports import Learner
from app.events.queue_door import QueueDoor
from app.events.retention import Kept, Retention
from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.checker import ConsistencyChecker
from app.profiles.consistency.inspection import Inspector
from app.profiles.online.compute import Computation
from app.profiles.online.fill import Filler
from app.profiles.online.invalidation import Invalidator, Stale
from app.profiles.online.local_cache import LocalCache
from app.profiles.online.reader import ProfileReader
from app.profiles.online.trust import TrustGate
from app.profiles.quality.drilldown import Drilldown
from app.profiles.quality.measurement import QualityMeasurement
from app.profiles.quality.runs import DataQuality
from app.profiles.rebuild.rebuilder import Rebuilder
from app.profiles.rebuild.runs import RebuildRunner
from app.profiles.trial import SAMPLE, costs, try_features
from app.settings import Settings
from app.stores.queue.client import Queue
from app.stores.sqlite.audit_trail import SqliteAuditTrail
from app.stores.sqlite.change_feed import SqliteChangeFeed
from app.stores.sqlite.cutoffs import SqliteCutoffs
from app.stores.sqlite.database import Database
from app.stores.sqlite.dead_letters import SqliteDeadLetters
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.feature_check import check_features
from app.stores.sqlite.local_cache_epoch import recall
from app.stores.sqlite.owed_invalidations import SqliteOwedInvalidations, announce
from app.stores.sqlite.quality_runs import SqliteQualityRepository
from app.stores.sqlite.rebuilds import SqliteRebuildRepository
from app.stores.sqlite.recent_events import SqliteRecentEvents
from app.stores.sqlite.registries import SqliteRegistries
from app.stores.sqlite.samples import SqliteSamples
from app.stores.sqlite.source import SqliteSource
from app.stores.sqlite.user_events import SqliteUserEvents
from app.stores.sqlite.users import SqliteUsers
from app.stores.system_clock import SystemClock
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.null_cache import NullCache
from app.telemetry import Metrics, logger

# The doors of processes that go on serving what they announce; a command does its work and ends.
SERVING = ("http", "queue")
log = logger("assembly")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts of one process, joined. `process` is its name: random, new with every start. `costs`: what a trial at
    the start has measured, in microseconds a user, by the index of the feature.
    """

    settings: Settings
    contract: Contract
    clock: Clock
    metrics: Metrics
    database: Database
    cache: ValkeyCache | NullCache
    queue: Queue | None
    reader: ProfileReader
    rebuilder: Rebuilder
    invalidator: Invalidator
    ingestor: Ingestor
    queue_door: QueueDoor
    consumer: Consumer
    log: SqliteEventLog
    letters: SqliteDeadLetters
    users: SqliteUsers
    user_events: SqliteUserEvents
    inspector: Inspector
    checker: ConsistencyChecker
    book: SqliteRebuildRepository
    audit: SqliteAuditTrail
    samples: SqliteSamples
    process: str
    registries: SqliteRegistries
    computation: Computation
    costs: Mapping[int, float]
    runner: RebuildRunner
    quality: DataQuality
    retention: Retention
    bandit: Bandit

    async def recall(self) -> None:
        """Let every process forget what it keeps near; to be called once rebuilt values stand."""
        await recall(self.database)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foundation:
    """What is opened first, and closed last."""

    settings: Settings
    contract: Contract
    clock: Clock
    metrics: Metrics
    database: Database
    cache: ValkeyCache | NullCache
    owed: SqliteOwedInvalidations
    queue: Queue | None
    near: LocalCache | None
    source: SqliteSource
    availability: FeatureAvailability
    costs: Mapping[int, float]


@asynccontextmanager
async def open_service(
    settings: Settings,
    *,
    door: str,
    contract: Contract | None = None,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    learners: Sequence[Learner] = (),
) -> AsyncIterator[Service]:
    """Open everything, and close it on the way out. `door` labels the ingest metrics.

    Without `cache_url` the service computes every read and owes every invalidation; without `queue_url` events wait
    for the sweep. That is what commands do where no server is named.

    Raises:
        SettingsError, RegistryError, SchemaMismatch, StoreUnavailable: the process must not start.
    """
    contract = contract or load_contract(settings)
    clock = clock or SystemClock()
    metrics = metrics or Metrics()
    check_contract(contract, settings)
    async with AsyncExitStack() as stack:
        database = await Database.open(settings.database, settings.readers)
        stack.push_async_callback(database.close)
        await database.read(lambda connection: check_features(contract.registry, connection))
        owed = SqliteOwedInvalidations(database)
        stack.callback(owed.close)
        owed.any_owed()  # a first look, which also tells which features are disabled
        source = SqliteSource(
            database, contract.registry, width=settings.readers, timeout_s=settings.statement_timeout_ms / 1000
        )
        availability = FeatureAvailability(contract.registry, clock, owed.disabled)
        serves = door in SERVING
        measured = await _tried(database, source, contract.registry, clock, availability) if serves else {}
        await announce(database, contract.registry, clock.now_ms())
        if serves:
            await SqliteRegistries(database).announce(contract.registry, clock.now_ms())
        queue = named_queue(settings, metrics)
        if queue is not None:
            stack.push_async_callback(queue.close)
        cache = named_cache(settings, database, owed, clock, metrics)
        stack.push_async_callback(cache.close)
        await cache.open()
        foundation = _Foundation(
            settings=settings,
            contract=contract,
            clock=clock,
            metrics=metrics,
            database=database,
            cache=cache,
            owed=owed,
            queue=queue,
            near=LocalCache(SqliteChangeFeed(owed.data_version), contract.registry, clock, settings.near_users)
            if door == "http" and settings.near_users
            else None,
            source=source,
            availability=availability,
            costs=measured,
        )
        service = _join(foundation, door, learners)
        stack.push_async_callback(service.reader.close)
        stack.push_async_callback(service.bandit.scorer.close)
        stack.push_async_callback(service.ingestor.close)
        settling = asyncio.get_running_loop().create_task(service.invalidator.keep_settling())
        stack.push_async_callback(end, [settling])
        stack.callback(database.interrupt)  # first of all: what closes next waits for what is being computed
        yield service


async def _tried(
    database: Database, source: SqliteSource, registry: Registry, clock: Clock, availability: FeatureAvailability
) -> Mapping[int, float]:
    """Compute each feature once for some stored users; what each costs.

    Raises:
        RegistryError: one fails that no process has served before. One that has been served is paused instead.
    """
    users = await SqliteUsers(database).newest_users(SAMPLE)
    announced = await SqliteRegistries(database).announced()
    served = {item.fingerprint for known in announced for item in known.definitions}
    trials = await try_features(source, registry, registry.full_mask & ~availability.disabled, users, clock)
    measured = costs(trials)
    if measured:
        shown = {registry.names[index]: round(cost) for index, cost in measured.items()}
        log.info("features_tried", users=len(users), us_per_user=shown)
    for trial in trials:
        entry = registry[trial.feature]
        if trial.error is None:
            continue
        if entry.fingerprint not in served:
            raise RegistryError(entry.name, f"a trial with {len(users)} stored users failed: {trial.error}")
        availability.pause(trial.feature, trial.user_id, trial.error, slow=trial.overdue)
    return measured


def _join(base: _Foundation, door: str, learners: Sequence[Learner]) -> Service:
    settings, clock, metrics, database, cache = base.settings, base.clock, base.metrics, base.database, base.cache
    registry = base.contract.registry
    invalidator = Invalidator(cache=cache, owed=base.owed, clock=clock, metrics=metrics)
    source = base.source
    computation = Computation(source, registry, clock, metrics, settings.readers, base.availability)
    filler = Filler(cache, registry, Random(), metrics)  # noqa: S311  # jitter, not secrecy
    rebuilder = Rebuilder(
        cache=cache, computation=computation, filler=filler, registry=registry, invalidate=invalidator.invalidate
    )
    log, letters, users = SqliteEventLog(database), SqliteDeadLetters(database), SqliteUsers(database)
    book = SqliteRebuildRepository(database)
    ingestor = Ingestor(
        log=log,
        invalidator=invalidator,
        # A worker consumes the events of its own jobs, so it publishes nothing.
        publisher=None if door == "queue" else base.queue,
        admission=Admission(settings.retention_days),
        clock=clock,
        metrics=metrics,
        door=door,
    )
    gate = TrustGate(base.owed.any_owed, clock, invalidator.wake)
    reader = ProfileReader(
        cache=cache,
        gate=gate,
        computation=computation,
        filler=filler,
        registry=registry,
        metrics=metrics,
        near=base.near,
    )
    inspector = Inspector(cache=cache, trusted=gate.holds, users=users, computation=computation, registry=registry)

    async def drop(stale: Stale) -> None:
        await invalidator.invalidate(stale)
        await recall(database)

    own = bandit(settings, database, reader, clock, metrics)
    consumer = Consumer(
        log=log,
        letters=letters,
        invalidator=invalidator,
        learners=[own.learner, *learners],
        clock=clock,
        metrics=metrics,
    )

    return Service(
        settings=settings,
        contract=base.contract,
        clock=clock,
        metrics=metrics,
        database=database,
        cache=cache,
        queue=base.queue,
        reader=reader,
        rebuilder=rebuilder,
        invalidator=invalidator,
        ingestor=ingestor,
        queue_door=QueueDoor(ingestor, letters, clock, metrics),
        consumer=consumer,
        log=log,
        letters=letters,
        users=users,
        user_events=SqliteUserEvents(database),
        inspector=inspector,
        checker=ConsistencyChecker(inspector=inspector, events=SqliteRecentEvents(database), drop=drop),
        book=book,
        audit=SqliteAuditTrail(database),
        samples=SqliteSamples(database),
        process=secrets.token_hex(4),
        registries=SqliteRegistries(database, base.owed.any_owed),
        computation=computation,
        costs=base.costs,
        runner=RebuildRunner(book=book, rebuilder=rebuilder, users=users, registry=registry, clock=clock),
        quality=_quality(base, users, inspector),
        retention=Retention(
            [
                Kept("events", log, settings.retention_days),
                Kept("decisions", own.decisions, settings.decision_retention_days),
            ],
            SqliteCutoffs(database),
            clock,
        ),
        bandit=own,
    )


def _quality(base: _Foundation, users: SqliteUsers, inspector: Inspector) -> DataQuality:
    registry, clock = base.contract.registry, base.clock
    measurement = QualityMeasurement(
        inspector=inspector,
        users=users,
        source=base.source,
        registry=registry,
        availability=base.availability,
        clock=clock,
        random=Random(),  # noqa: S311  # a sample, not secrecy
    )

    async def start(run_id: int) -> None:
        if base.queue is not None:
            await base.queue.start_quality(run_id)

    return DataQuality(
        measurement=measurement,
        runs=SqliteQualityRepository(base.database),
        drilldown=Drilldown(inspector=inspector, users=users, registry=registry, clock=clock),
        clock=clock,
        start=start,
    )
