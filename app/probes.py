"""What probes and Prometheus are told: whether each thing the service depends on answers now, and what waits in it.

Must not know HTTP. What does not answer is told as such, within the timeouts of its adapter; nothing here raises.
"""

from __future__ import annotations

import asyncio

from app.api.context import Check
from app.assembly import Service
from app.errors import CacheRefused, CacheUnavailable, QueueUnavailable, StoreUnavailable
from app.stores.sqlite.outbox import backlog
from app.telemetry import logger

log = logger("probes")


async def readiness(service: Service) -> dict[str, Check]:
    """What the service depends on, each asked now."""
    database, cache, queue = await asyncio.gather(
        _check_database(service), _check_cache(service), _check_queue(service)
    )
    return {**database, **cache, **queue}


async def _check_database(service: Service) -> dict[str, Check]:
    try:
        owed = (await backlog(service.database)).owed
    except StoreUnavailable as error:
        return {"database": _unanswered("database", "it does not answer; nothing can be served", error, vital=True)}
    detail = f"{owed} invalidations are owed to the cache; reads compute until they are made"
    return {"database": Check(True, "", vital=True), "invalidations": Check(owed == 0, detail)}


async def _check_cache(service: Service) -> dict[str, Check]:
    try:
        if not service.cache.available:
            raise CacheUnavailable("the circuit breaker is open")
        await service.cache.check()
    except CacheRefused as error:
        return {"cache": _unanswered("cache", "it refuses writes; what it lacks is computed from the database", error)}
    except CacheUnavailable as error:
        return {"cache": _unanswered("cache", "it does not answer; reads compute from the database", error)}
    return {"cache": Check(True, "")}


async def _check_queue(service: Service) -> dict[str, Check]:
    if service.queue is None:
        return {"queue": Check(False, "no queue is set (PROFILES_QUEUE_URL); events wait for a sweep")}
    try:
        alive = await service.queue.worker_alive()
    except QueueUnavailable as error:
        queue = _unanswered("queue", "it does not answer; events are kept and wait for a sweep", error)
        return {"queue": queue, "worker": Check(False, "unknown: the queue does not answer")}
    return {"queue": Check(True, ""), "worker": Check(alive, "no worker has shown itself in the last seconds")}


def _unanswered(name: str, detail: str, error: Exception, *, vital: bool = False) -> Check:
    # Addresses and paths are for the log: anybody may ask for readiness.
    log.warning("not_answering", what=name, error=str(error))
    return Check(False, detail, vital)


async def refresh_gauges(service: Service) -> None:
    """Ask for what is counted on demand. What does not answer keeps its last value, the queue's depth is -1."""
    metrics = service.metrics
    try:
        state = await backlog(service.database)
    except StoreUnavailable as error:
        log.warning("gauges_not_refreshed", error=str(error))
    else:
        oldest = state.oldest_received_at_ms
        age_s = max(0, service.clock.now_ms() - oldest) / 1000 if oldest is not None else 0.0
        metrics.oldest_unconsumed.set(age_s)
        metrics.unconsumed.set(state.unconsumed)
        metrics.dead_letters.set(state.dead_letters)
        metrics.owed.set(state.owed)
    try:
        metrics.queue_depth.set(await service.queue.depth() if service.queue is not None else -1)
    except QueueUnavailable:
        metrics.queue_depth.set(-1)
