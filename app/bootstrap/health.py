"""What a process asks of its parts about how they are: readiness, gauges, and the samples made of both.

Must not know HTTP. What does not answer is told as such, within the timeouts of its adapter; readiness and gauges
raise nothing. Addresses and paths are for the log: readiness may be asked for by anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from app.bandit.rollout.stages import STAGES
from app.bootstrap.service import Service
from app.concurrency.periodic import repeat
from app.concurrency.tasks import end
from app.errors import CacheRefused, CacheUnavailable, QueueUnavailable, StoreUnavailable
from app.features.clock import rfc3339
from app.operations.sampler import EVERY_S, Sampler
from app.operations.samples import Gauges, Process, Role
from app.operations.states import ReadinessCheck, State
from app.stores.sqlite.connection import check_rights
from app.stores.sqlite.database import Database
from app.stores.sqlite.outbox import backlog, events_ahead
from app.telemetry import logger

log = logger("probes")


async def readiness(service: Service) -> dict[str, ReadinessCheck]:
    """What the service depends on, each asked now."""
    database, cache, queue = await asyncio.gather(
        _check_database(service), _check_cache(service), _check_queue(service)
    )
    return {**database, **cache, **queue, "features": _check_features(service)}


async def _check_database(service: Service) -> dict[str, ReadinessCheck]:
    try:
        owed = (await backlog(service.database)).owed
    except StoreUnavailable as error:
        return {"database": _unanswered("database", f"{error.told}; nothing can be served", error, vital=True)}
    detail = f"{owed} invalidations are owed to the cache; reads compute until they are made"
    trouble = await _database_trouble(service.database)
    return {
        "database": ReadinessCheck(trouble is None, trouble or "", state="degraded"),
        "invalidations": ReadinessCheck(owed == 0, detail, state="degraded"),
    }


async def _database_trouble(database: Database) -> str | None:
    if database.full:
        return "the disk is full: events and decisions are refused, reads go on"
    if (links := database.links) > 1:
        return f"its file has {links} names (hard links); remove all but one: each has a write-ahead log of its own"
    try:
        await asyncio.to_thread(check_rights, database.path)
    except StoreUnavailable as error:
        log.warning("not_answering", what="database", error=str(error))
        return error.told
    return None


async def _check_cache(service: Service) -> dict[str, ReadinessCheck]:
    try:
        await service.cache.check()
    except CacheRefused as error:
        detail = f"{str(error).partition(':')[0]}; what it lacks is computed from the database"
        return {"cache": _unanswered("cache", detail, error, state="degraded")}
    except CacheUnavailable as error:
        return {"cache": _unanswered("cache", f"{error.told}; reads compute from the database", error)}
    return {"cache": ReadinessCheck(service.cache.available, "it answers again; reads compute for a moment longer")}


def _check_features(service: Service) -> ReadinessCheck:
    """Whether every feature can be computed in this process. What admins have disabled is no fault."""
    service.computation.try_again()
    troubles = service.computation.availability.troubles()
    detail = "; ".join(f"{item.feature}: {item.reason}, since {rfc3339(item.since_ms)}" for item in troubles)
    return ReadinessCheck(not troubles, f"failing, and answered as null: {detail}", state="degraded")


async def _check_queue(service: Service) -> dict[str, ReadinessCheck]:
    if service.queue is None:
        return {"queue": ReadinessCheck(False, "no queue is set (PROFILES_QUEUE_URL); events wait for a sweep")}
    try:
        alive = await service.queue.worker_alive()
        others = await service.queue.databases(service.clock.now_ms()) - {service.database.id}
    except QueueUnavailable as error:
        queue = _unanswered("queue", f"{error.told}; events are kept and wait for a sweep", error)
        return {"queue": queue, "worker": ReadinessCheck(False, "unknown: the queue does not answer", state="unknown")}
    shared = "workers of another database take jobs from it; give each service its own PROFILES_QUEUE_NAME"
    return {
        "queue": ReadinessCheck(not others, shared, state="degraded"),
        "worker": ReadinessCheck(alive, "no worker has shown itself in the last seconds"),
    }


def _unanswered(
    name: str, detail: str, error: Exception, *, vital: bool = False, state: State = "down"
) -> ReadinessCheck:
    log.warning("not_answering", what=name, error=str(error))
    return ReadinessCheck(False, detail, vital, state)


async def gauges(service: Service) -> Gauges:
    """Work not done, asked for now; None for what does not answer."""
    depth: int | None = None
    if service.queue is not None:
        with suppress(QueueUnavailable):  # readiness tells the log
            depth = await service.queue.depth()
    try:
        state = await backlog(service.database)
        ahead = await events_ahead(service.database, service.clock.now_ms())
    except StoreUnavailable as error:
        log.warning("gauges_not_refreshed", error=str(error))
        return Gauges(queue_depth=depth)
    oldest = state.oldest_received_at_ms
    return Gauges(
        queue_depth=depth,
        outbox=state.unconsumed,
        outbox_age_s=max(0, service.clock.now_ms() - oldest) / 1000 if oldest is not None else 0.0,
        dead_letters=state.dead_letters,
        owed=state.owed,
        events_ahead=ahead,
        unreadable=state.unreadable,
    )


async def refresh_gauges(service: Service) -> None:
    """Bring the metrics up to date. What does not answer keeps its last value, the queue's depth is -1."""
    await _refreshed(service)


async def _refreshed(service: Service) -> Gauges:
    metrics, found = service.metrics, await gauges(service)
    await _tell_of_the_rollout(service)
    metrics.queue_depth.set(found.queue_depth if found.queue_depth is not None else -1)
    for gauge, value in (
        (metrics.oldest_unconsumed, found.outbox_age_s),
        (metrics.unconsumed, found.outbox),
        (metrics.dead_letters, found.dead_letters),
        (metrics.owed, found.owed),
        (metrics.events_ahead, found.events_ahead),
        (metrics.bandit.unreadable, found.unreadable),
    ):
        if value is not None:
            gauge.set(value)
    return found


async def _tell_of_the_rollout(service: Service) -> None:
    try:
        state = await service.bandit.rollout.book.state()
    except StoreUnavailable:  # `gauges` tells the log
        return
    service.metrics.bandit.share.set(state.share)
    for stage in STAGES:
        service.metrics.bandit.stage.labels(stage).set(stage == state.stage)


def sampler(service: Service, role: Role) -> Sampler:
    """The sampler of a process."""
    return Sampler(
        process=Process(role, service.process, service.contract.registry.fingerprint),
        metrics=service.metrics,
        store=service.samples,
        ask_gauges=lambda: _refreshed(service),  # a worker is not scraped through its event loop
        ask_readiness=lambda: readiness(service),
        clock=service.clock,
    )


@asynccontextmanager
async def sampling(service: Service, role: Role) -> AsyncIterator[None]:
    """Take samples in the background, and the last one at the end."""
    own = sampler(service, role)
    log.info("sampling", role=role, process=service.process)
    task = asyncio.get_running_loop().create_task(repeat("sample", own.sample, EVERY_S))
    try:
        yield
    finally:
        await end([task])
        await own.close()
