"""The arq queue, as the API and the command line use it: enqueueing jobs and querying the queue's state.

Publishing never raises and never blocks the caller. If a job is lost, the worker's periodic sweep finds its events in
the event log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from app.concurrency.batcher import Bounds, Handover
from app.errors import QueueUnavailable
from app.stores.queue import jobs
from app.stores.valkey.pool import AWAY, blocking_pool, public_reason
from app.telemetry import TRACEPARENT, Metrics, logger

if TYPE_CHECKING:
    from arq.connections import ArqRedis
    from redis.asyncio import BlockingConnectionPool, Redis

# As in arq, which is imported on first use, because it takes 5 ms of the start.
QUEUE = "arq:queue"
HEALTH_SUFFIX = ":health-check"  # of the key that the workers of a queue refresh while they are alive
HEALTH_KEY = QUEUE + HEALTH_SUFFIX
# A sorted set: ids of the databases in which workers of this queue store events; the score is the last report's time.
DATABASES_SUFFIX = ":databases"
SHOWN_MS = 15_000
TIMEOUT_S = 1.0
CLOSE_S = 2.0
MAX_CONNECTIONS = 8
JOBS_AT_ONCE = 20
CHECK_S = 0.05
CHECKS = 100
STILL_RUNNING = "a worker is still storing events of the user"
# A job costs far more than an event in it. No caller waits for a job: the cache keys have been deleted already.
BOUNDS = Bounds(kind="publishing", at_once=1_000, most=100_000, apart_s=0.05)
log = logger("stores.queue")


def client(connections: BlockingConnectionPool, name: str, kind: type[ArqRedis] | None = None) -> ArqRedis:
    """A client of the queue `name`. It connects on first use."""
    from arq.connections import ArqRedis  # noqa: PLC0415

    return (kind or ArqRedis)(
        connection_pool=connections,
        job_serializer=jobs.serialize,
        job_deserializer=jobs.deserialize,
        default_queue_name=name,
    )


async def shown_databases(redis: Redis, queue: str, now_ms: int) -> set[str]:
    """The ids (see `without_timeline`) of the databases whose workers reported to a queue in the last `SHOWN_MS`."""
    found = await redis.zrangebyscore(queue + DATABASES_SUFFIX, now_ms - SHOWN_MS, now_ms + SHOWN_MS)
    return {without_timeline(item if isinstance(item, str) else item.decode()) for item in found}


def without_timeline(database_id: str) -> str:
    """The id of a database without PostgreSQL's timeline, which changes with every failover."""
    parts = database_id.split(":")
    return ":".join(parts[:2] + parts[3:])


class Queue:
    """Publishes events and queries the queue's state. All methods but `publish` and `close` raise `QueueUnavailable` if
    the queue does not answer."""

    def __init__(self, url: str, metrics: Metrics, name: str = QUEUE, bounds: Bounds = BOUNDS) -> None:
        self._name = name
        self._pool = blocking_pool(url, TIMEOUT_S, MAX_CONNECTIONS)
        self._metrics = metrics
        self._events: Handover[int] = Handover(self._enqueue, bounds)

    @cached_property
    def _redis(self) -> ArqRedis:
        return client(self._pool, self._name)

    def publish(self, seqs: Sequence[int]) -> None:
        """Enqueue jobs for the events with these sequence numbers, in the background; return at once. If too many
        events wait to be sent (`Bounds.most`), the rest is left to the worker's periodic sweep."""
        self._events.add(seqs)

    async def depth(self) -> int:
        return int(await self._ask("ZCARD", self._name))

    async def worker_alive(self) -> bool:
        """Whether a worker has refreshed the health key in the last three seconds."""
        return int(await self._ask("EXISTS", self._name + HEALTH_SUFFIX)) == 1

    async def show_database(self, database_id: str, now_ms: int) -> None:
        """Record that a worker of this database uses the queue."""
        key = self._name + DATABASES_SUFFIX
        await self._ask("ZADD", key, str(now_ms), database_id)
        await self._ask("ZREMRANGEBYSCORE", key, "-inf", str(now_ms - SHOWN_MS))
        await self._ask("ZREMRANGEBYSCORE", key, str(now_ms + SHOWN_MS), "+inf")  # of a clock that was ahead

    async def databases(self, now_ms: int) -> set[str]:
        with _answering():
            return await shown_databases(self._redis, self._name, now_ms)

    async def erase(self, user_id: str) -> int:
        """Remove a user's events from waiting jobs; return how many jobs changed. On return, no worker still runs one
        of these jobs with the user's events."""
        touched = set[str]()
        with _answering():
            for _ in range(2):  # the second time for the jobs into which large ones were split
                waiting = [job_id.decode() for job_id in await self._redis.zrange(self._name, 0, -1)]
                for start in range(0, len(waiting), JOBS_AT_ONCE):
                    ids = waiting[start : start + JOBS_AT_ONCE]
                    await asyncio.gather(*(jobs.split(self._redis, job_id) for job_id in ids))
                    found = await self._redis.mget(jobs.JOB_PREFIX + job_id for job_id in ids)
                    named = [job_id for job_id, raw in zip(ids, found, strict=True) if user_id.encode() in (raw or b"")]
                    touched.update([job_id for job_id in named if await jobs.erase(self._redis, job_id, user_id)])
        for _ in range(CHECKS):
            # A worker may have fetched one of the jobs before the events were removed.
            if not touched or not await self._ask("EXISTS", *(jobs.RUNNING_PREFIX + job_id for job_id in touched)):
                return len(touched)
            await asyncio.sleep(CHECK_S)
        raise QueueUnavailable(STILL_RUNNING, STILL_RUNNING)

    async def close(self) -> None:
        """Publish pending events for up to `CLOSE_S` seconds, then close."""
        await self._events.close(CLOSE_S)
        await self._pool.disconnect()

    async def _enqueue(self, seqs: list[int]) -> None:
        trace: dict[str, Any] = {} if (traceparent := TRACEPARENT.get()) is None else {"traceparent": traceparent}
        try:
            await self._redis.enqueue_job(jobs.CONSUME, seqs, **trace)
        except AWAY as error:
            self._metrics.publish_failures.inc()
            log.warning("publish_failed", job=jobs.CONSUME, error=str(error))

    async def _ask(self, *command: str | bytes) -> Any:
        with _answering():
            return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except AWAY as error:
        raise QueueUnavailable(f"{type(error).__name__}: {error}", public_reason(error)) from error
