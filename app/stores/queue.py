"""The arq queue, as the API and the command line use it: telling workers of events, and asking how they are.

Publishing never fails the caller and never makes it wait: what the queue does not take, the sweep makes good for.
Jobs are msgpack; what is not, or names no job of ours, is turned into a job that buries it, never unpickled.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import msgspec
from arq.connections import ArqRedis
from arq.constants import default_queue_name, health_check_key_suffix
from redis.asyncio.connection import BlockingConnectionPool
from redis.exceptions import RedisError

from app.errors import QueueUnavailable
from app.telemetry import Metrics, logger

QUEUE = default_queue_name
HEALTH_KEY = QUEUE + health_check_key_suffix
CONSUME = "consume_events"
TIP_EVENTS = "tip_events"
REBUILD = "run_rebuild"
BURY = "bury_job"
JOBS = frozenset({CONSUME, TIP_EVENTS, REBUILD, BURY})
CRON_PREFIX = "cron:"
TIMEOUT_S = 1.0
SEQS_PER_JOB = 1_000
PENDING_CAP = 100_000
log = logger("stores.queue")


def serialize(job: dict[str, Any]) -> bytes:
    """A job, or its result, as msgpack."""
    return msgspec.msgpack.encode(job, enc_hook=repr)


def deserialize(raw: bytes) -> dict[str, Any]:
    """A job as arq wants it; anything else becomes a job that buries the bytes."""
    try:
        job = msgspec.msgpack.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _burial(raw, f"the job is not msgpack: {error}")
    if "f" not in job:
        return job  # a result
    name = job["f"]
    if name not in JOBS and not str(name).startswith(CRON_PREFIX):
        return _burial(raw, f"unknown job {name!r}; known are {TIP_EVENTS}")
    if name == TIP_EVENTS and (len(job.get("a") or ()) != 1 or job.get("k")):
        return _burial(raw, f"{TIP_EVENTS} takes one argument, a list of events")
    return job


def _burial(raw: bytes, reason: str) -> dict[str, Any]:
    return {"t": 1, "f": BURY, "a": [base64.b64encode(raw).decode(), reason], "k": {}, "et": 0}


def connect(url: str, *, blocking_s: float = TIMEOUT_S) -> ArqRedis:
    """A client of the queue; connects when first used."""
    pool: Any = BlockingConnectionPool.from_url(
        url, max_connections=8, timeout=blocking_s, socket_timeout=blocking_s, socket_connect_timeout=blocking_s
    )
    return ArqRedis(connection_pool=pool, job_serializer=serialize, job_deserializer=deserialize)


class Queue:
    """Implements `app.events.ports.Publisher`, and what admins ask."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        self._redis = connect(url)
        self._metrics = metrics
        self._pending: list[int] = []
        self._publishing: asyncio.Task[None] | None = None

    def publish(self, seqs: Sequence[int]) -> None:
        """Tell workers, soon, many events in one job."""
        if not seqs or len(self._pending) > PENDING_CAP:
            return
        self._pending.extend(seqs)
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().create_task(self._publish_all())

    async def start_rebuild(self, run_id: str) -> None:
        """Ask a worker to carry out a run; without an answer, the sweep does."""
        try:
            await self._redis.enqueue_job(REBUILD, run_id, _job_id=f"rebuild:{run_id}")
        except (RedisError, OSError, TimeoutError) as error:
            self._metrics.publish_failures.inc()
            log.warning("publish_failed", job=REBUILD, error=str(error))

    async def depth(self) -> int:
        """Jobs waiting or running. Raises `QueueUnavailable`."""
        return int(await self._ask("ZCARD", QUEUE))

    async def worker_alive(self) -> bool:
        """Whether some worker has shown itself lately. Raises `QueueUnavailable`."""
        return int(await self._ask("EXISTS", HEALTH_KEY)) == 1

    async def close(self) -> None:
        """Publish what waits, then close."""
        if self._publishing is not None:
            await asyncio.gather(self._publishing, return_exceptions=True)
        await self._redis.aclose()

    async def _ask(self, *command: str) -> Any:
        try:
            return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except (RedisError, OSError, TimeoutError) as error:
            raise QueueUnavailable(f"{type(error).__name__}: {error}") from error

    async def _publish_all(self) -> None:
        try:
            while self._pending:
                seqs, self._pending = self._pending[:SEQS_PER_JOB], self._pending[SEQS_PER_JOB:]
                try:
                    await self._redis.enqueue_job(CONSUME, seqs)
                except (RedisError, OSError, TimeoutError) as error:
                    self._pending.clear()
                    self._metrics.publish_failures.inc()
                    log.warning("publish_failed", job=CONSUME, error=str(error))
        finally:
            self._publishing = None
