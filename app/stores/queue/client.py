"""The arq queue, as the API and the command line use it: enqueueing jobs and querying the queue's state.

Publishing never raises and never blocks the caller. If a job is lost, the worker's periodic sweep finds its events in
the event log. Jobs are encoded as msgpack. If a job is not msgpack or has an unknown name, the worker stores the job
itself as a dead letter. A pickle is never loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded, QueueUnavailable
from app.events.naming import names, not_naming
from app.stores.valkey.pool import AWAY, blocking_pool, public_reason
from app.telemetry import Metrics, logger

if TYPE_CHECKING:
    from arq.connections import ArqRedis
    from redis.asyncio import BlockingConnectionPool

# arq's own constants. arq is imported on first use, because it takes 5 ms of the start.
QUEUE = "arq:queue"
HEALTH_SUFFIX = ":health-check"
JOB_PREFIX = "arq:job:"
HEALTH_KEY = QUEUE + HEALTH_SUFFIX
# A sorted set of the ids of the databases in which workers of this queue store events, by the time of the last report.
DATABASES_SUFFIX = ":databases"
SHOWN_MS = 15_000
CONSUME = "consume_events"
TIP_EVENTS = "tip_events"
LARGE_TIP_EVENTS = "large_tip_events"
REBUILD = "run_rebuild"
BURY = "bury_job"
QUALITY = "measure_quality"
PRUNE = "cron:prune"
HOURLY_QUALITY = "cron:quality"
JOBS = frozenset({CONSUME, TIP_EVENTS, LARGE_TIP_EVENTS, REBUILD, BURY, QUALITY, PRUNE, HOURLY_QUALITY})
PICKLED = "the job is a pickle, the default of arq; publish with job_serializer=msgspec.msgpack.encode"
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
MOST_TRIES = 1_000
YEAR_3000_MS = 32_503_680_000_000
TIMEOUT_S = 1.0
CLOSE_S = 2.0
MAX_CONNECTIONS = 8
JOBS_AT_ONCE = 20
# A job costs far more than an event, and no caller waits for it: the keys are deleted already.
BOUNDS = Bounds(kind="publishing", at_once=1_000, most=100_000, apart_s=0.05)
log = logger("stores.queue")


def serialize(job: dict[str, Any]) -> bytes:
    """Encode a job, or its result, as msgpack."""
    return msgspec.msgpack.encode(job, enc_hook=repr)


class _Job(msgspec.Struct):
    """A job as arq encodes it. Publishers without arq may omit all fields but `f` and `a`. `f`: name of the function.
    `a`, `k`: positional and keyword arguments. `t`: current try, from 1. `et`: time of enqueueing in milliseconds."""

    f: str
    a: list[Any]
    k: dict[str, Any] = msgspec.field(default_factory=dict)
    t: int | None = None
    et: int = 0


def deserialize(raw: bytes) -> dict[str, Any]:
    """Decode a job into the mapping that arq expects. An invalid job becomes one that stores its content as a dead
    letter. Never raises: arq drops a job that it cannot deserialize, and a field of a wrong type ends the worker."""
    try:
        found = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        reason = PICKLED if is_pickle(raw) and raw.endswith(b".") else f"the job is not msgpack: {error}"
        return burial(raw.decode("utf-8", "backslashreplace"), reason)
    try:
        job = msgspec.convert(found, _Job)
    except (msgspec.ValidationError, RecursionError) as error:
        return burial(found, f"not a job: {error}")
    if job.f not in JOBS and not job.f.startswith((PRUNE + ":", HOURLY_QUALITY + ":")):
        return burial(found, f"unknown job {job.f!r}; publish events as {TIP_EVENTS}")
    if job.f == TIP_EVENTS and (len(job.a) != 1 or job.k):
        return burial(found, f"{TIP_EVENTS} takes one argument, a list of events")
    tries = min(max(job.t or 1, 1), MOST_TRIES)
    enqueued_at_ms = job.et if 0 <= job.et < YEAR_3000_MS else 0
    return {"t": tries, "f": job.f, "a": job.a, "k": job.k, "et": enqueued_at_ms}


def is_pickle(raw: bytes) -> bool:
    """Whether the first bytes are those of a pickle of protocol 2 to 5."""
    return raw.startswith(_PICKLE)


def burial(payload: object, reason: str) -> dict[str, Any]:
    """A job that stores `payload` as a dead letter with `reason` as its error."""
    return {"t": 1, "f": BURY, "a": [payload, reason], "k": {}, "et": 0}


def without_user(raw: bytes, user_id: str) -> bytes:
    """Remove a user from the bytes of a waiting job, and return the new bytes.

    An argument that is a list loses its items that name the user. An argument of any other type that names the user
    becomes an empty list. If the user is named outside the arguments, or in bytes that cannot be decoded, the whole job
    becomes a `tip_events` job without events.
    """
    if user_id.encode() not in raw:
        return raw
    try:
        found = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        found = raw
    if isinstance(found, dict) and isinstance(arguments := found.pop("a", None), list) and not names(found, user_id):
        rest = [_rest(argument, user_id) for argument in arguments]
        return raw if rest == arguments else serialize({**found, "a": rest})
    return serialize({"f": TIP_EVENTS, "a": [[]]}) if names(found, user_id) else raw


def _rest(argument: object, user_id: str) -> object:
    if isinstance(argument, list):
        return not_naming(argument, argument, user_id)
    return [] if names(argument, user_id) else argument


def connect(
    url: str, name: str = QUEUE, *, blocking_s: float = TIMEOUT_S, connections: int = MAX_CONNECTIONS
) -> ArqRedis:
    """A client of the queue `name`. It connects on first use, with up to `connections` connections. `blocking_s`: time
    limit, in seconds, of connecting, of each reply, and of the wait for a free connection."""
    return _client(_pool(url, blocking_s, connections), name)


def _pool(url: str, blocking_s: float, connections: int) -> BlockingConnectionPool:
    # No library name: redis-py swallows a cancellation while it announces one, and stopping would hang.
    return blocking_pool(url, blocking_s, connections, lib_name=None, lib_version=None)


def _client(pool: BlockingConnectionPool, name: str) -> ArqRedis:
    from arq.connections import ArqRedis  # noqa: PLC0415

    return ArqRedis(
        connection_pool=pool, job_serializer=serialize, job_deserializer=deserialize, default_queue_name=name
    )


def own_name(job: str, queue: str) -> str:
    """Make a job name or id unique among the queues of a server: arq keeps their jobs in one key space."""
    return job if queue == QUEUE else f"{job}:{queue}"


def health_key(name: str) -> str:
    """The Redis key that the workers of a queue refresh while they are alive."""
    return name + HEALTH_SUFFIX


class Queue:
    """Publishes events, starts runs and queries the queue's state. Implements `app.events.ports.Publisher`."""

    def __init__(self, url: str, metrics: Metrics, name: str = QUEUE, bounds: Bounds = BOUNDS) -> None:
        self._name = name
        self._pool = _pool(url, TIMEOUT_S, MAX_CONNECTIONS)
        self._metrics = metrics
        self._at_once = bounds.at_once
        self._jobs: Batcher[Sequence[int], None] = Batcher(self._enqueue, time.monotonic, bounds, size=len)

    @cached_property
    def _redis(self) -> ArqRedis:
        return _client(self._pool, self._name)

    def publish(self, seqs: Sequence[int]) -> None:
        """Return at once; jobs that consume the events are enqueued in the background. If too many events wait to be
        enqueued (`Bounds.most`), the rest is left to the worker's periodic sweep of the event log."""
        with suppress(Overloaded):
            for start in range(0, len(seqs), self._at_once):
                self._jobs.submit(seqs[start : start + self._at_once])

    async def start_rebuild(self, run_id: str) -> None:
        """Enqueue a rebuild. If that fails, the worker's periodic sweep enqueues it later."""
        await self._start(REBUILD, run_id, own_name(f"rebuild:{run_id}", self._name))

    async def start_quality(self, run_id: int) -> None:
        """Enqueue a measurement of data quality. If that fails, the worker's periodic sweep enqueues it later."""
        await self._start(QUALITY, run_id, own_name(f"quality:{run_id}", self._name))

    async def depth(self) -> int:
        """The number of jobs of this queue that wait or run. Raises `QueueUnavailable`."""
        return int(await self._ask("ZCARD", self._name))

    async def worker_alive(self) -> bool:
        """Whether a worker has refreshed the health key in the last three seconds. Raises `QueueUnavailable`."""
        return int(await self._ask("EXISTS", health_key(self._name))) == 1

    async def show_database(self, database_id: str, now_ms: int) -> None:
        """Record that a worker of this database uses the queue. Raises `QueueUnavailable`."""
        key = self._name + DATABASES_SUFFIX
        await self._ask("ZADD", key, str(now_ms), database_id)
        await self._ask("ZREMRANGEBYSCORE", key, "-inf", str(now_ms - SHOWN_MS))

    async def databases(self, now_ms: int) -> set[str]:
        """The ids of the databases whose workers reported in the last `SHOWN_MS`. Raises `QueueUnavailable`."""
        found = await self._ask("ZRANGEBYSCORE", self._name + DATABASES_SUFFIX, str(now_ms - SHOWN_MS), "+inf")
        return {item.decode() for item in found}

    async def erase(self, user_id: str) -> int:
        """Remove a user's events from waiting jobs; return how many jobs changed. Raises `QueueUnavailable`."""
        from app.stores.queue.large_jobs import LargeJob, position_of, set_aside  # noqa: PLC0415  # a cycle

        touched = 0
        waiting = [job_id.decode() for job_id in await self._ask("ZRANGE", self._name, "0", "-1")]
        for start in range(0, len(waiting), JOBS_AT_ONCE):
            ids = waiting[start : start + JOBS_AT_ONCE]
            await asyncio.gather(*(set_aside(self._redis, job_id) for job_id in ids))  # so that no job is large
            keys = [JOB_PREFIX + job_id for job_id in ids]
            for job_id, key, raw in zip(ids, keys, await self._ask("MGET", *keys), strict=True):
                if raw is not None and (position := position_of(deserialize(raw))) is not None:
                    touched += await LargeJob(self._redis, job_id).erase(user_id, position)
                    continue
                if raw is None or (rest := without_user(raw, user_id)) == raw:
                    continue
                # XX: a worker may have finished the job meanwhile, which must not be recreated.
                await self._ask("SET", key, rest, "XX", "KEEPTTL")
                touched += 1
        return touched

    async def close(self) -> None:
        """Publish pending events for up to `CLOSE_S` seconds, then close."""
        await self._jobs.close(CLOSE_S)
        await self._pool.disconnect()

    async def _start(self, job: str, run_id: str | int, job_id: str) -> None:
        try:
            await self._redis.enqueue_job(job, run_id, _job_id=job_id)
        except AWAY as error:
            self._metrics.publish_failures.inc()
            log.warning("publish_failed", job=job, error=str(error))

    async def _ask(self, *command: str | bytes) -> Any:
        try:
            return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except AWAY as error:
            raise QueueUnavailable(f"{type(error).__name__}: {error}", public_reason(error)) from error

    async def _enqueue(self, parts: Sequence[Sequence[int]]) -> list[None]:
        try:
            await self._redis.enqueue_job(CONSUME, [seq for part in parts for seq in part])
        except AWAY as error:
            self._metrics.publish_failures.inc()
            log.warning("publish_failed", job=CONSUME, error=str(error))
        return [None] * len(parts)
