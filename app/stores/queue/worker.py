"""Runs arq's worker. A lost connection to Redis ends the worker, and another one is then started.

Invariant: when `keep_working` returns, no job runs in this process. arq retries interrupted jobs after the job timeout
plus `ARQ_EXTRA_S`. arq reads some thirty replies from Redis for each job, and a timeout for each of them would cost CPU
time. So the worker's connections (`_Lean`) have none, and `_silence` detects a queue that does not reply.
"""

import asyncio
from contextlib import suppress
from datetime import UTC
from typing import Any

from arq.connections import ArqRedis
from arq.worker import Worker
from redis.asyncio.client import Pipeline
from redis.connection import HiredisRespSerializer

from app.concurrency.tasks import end
from app.stores.queue.client import HEALTH_SUFFIX, client
from app.stores.queue.jobs import deserialize, serialize, split
from app.stores.valkey.pool import AWAY, blocking_pool
from app.telemetry import logger

ARQ_EXTRA_S = 10
POLL_DELAY_S = 0.01
# Enough for a burst. More would be slower: in every poll, arq queries each running job again.
MAX_JOBS = 20
BLOCKING_S = 2.0
SILENT_S = 2.0
STOP_GRACE_S = 10.0
RESTART_AFTER_S = 0.5
log = logger("stores.queue")


async def keep_working(url: str, name: str, stop: asyncio.Event, **jobs: Any) -> None:
    """Run jobs until `stop` is set. `jobs`: `functions`, `job_timeout` and `ctx` of arq's worker."""
    stopping = asyncio.create_task(stop.wait())
    lost = False
    try:
        while not stop.is_set():
            worker = _Worker(url, name, **jobs)
            running = asyncio.create_task(worker.async_run())
            silent = asyncio.create_task(_silence(worker))
            try:
                await asyncio.wait({running, stopping, silent}, return_when=asyncio.FIRST_COMPLETED)
                if not stop.is_set():
                    error = repr(running.exception()) if running.done() else f"no answer for {SILENT_S} s"
                    (log.debug if lost else log.warning)("queue_lost", error=error)
                    lost = worker.jobs_complete == 0
                    with suppress(*AWAY):
                        # Fails every command that waits for a reply on these connections.
                        await worker.pool.connection_pool.disconnect()
                    await asyncio.wait({stopping}, timeout=RESTART_AFTER_S)
            finally:
                silent.cancel()
                await _close(worker, running)
    finally:
        stopping.cancel()


class _Worker(Worker):
    """arq's worker with three methods changed. `poll_ended` is set at the end of each poll of the queue."""

    def __init__(self, url: str, name: str, **jobs: Any) -> None:
        super().__init__(
            redis_pool=_client(url, name),
            queue_name=name,
            poll_delay=POLL_DELAY_S,
            max_jobs=MAX_JOBS,
            keep_result=0,
            health_check_interval=2,  # seconds
            health_check_key=name + HEALTH_SUFFIX,
            handle_signals=False,
            job_serializer=serialize,
            job_deserializer=deserialize,
            timezone=UTC,
            log_results=False,
            **jobs,
        )
        self.poll_ended = asyncio.Event()

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        """Start no more jobs once `allow_pick_jobs` is false. arq would start the whole list."""
        for job_id in job_ids:
            if not self.allow_pick_jobs:
                return
            await super().start_jobs([job_id])

    async def run_job(self, job_id: str, score: int) -> None:
        """Split a large job before it runs, because arq would load the whole job into memory."""
        await split(self.pool, job_id)
        await super().run_job(job_id, score)

    async def heart_beat(self) -> None:
        """Note the end of a poll, at which arq calls this method."""
        self.poll_ended.set()
        await super().heart_beat()


async def _silence(worker: _Worker) -> None:
    """Return when the worker has finished no poll for `SILENT_S` seconds: the queue does not reply."""
    worker.poll_ended.set()
    while worker.poll_ended.is_set():
        worker.poll_ended.clear()
        await asyncio.sleep(SILENT_S)


class _Lean:
    """A mixin for redis-py's asyncio connections that saves CPU time: hiredis packs the commands, not Python code."""

    _packer: Any = HiredisRespSerializer()
    _reader: asyncio.StreamReader | None

    def pack_command(self, *args: Any) -> list[bytes]:
        packed: list[bytes] = self._packer.pack(*args)
        return packed

    async def can_read_destructive(self) -> bool:
        """Whether unread data is left. Raises if the connection is closed. redis-py calls this whenever a connection
        leaves the pool; its own method starts a read and cancels it, which is slower."""
        reader = self._reader
        if reader is not None and not reader.at_eof() and not reader._buffer:  # type: ignore[attr-defined]  # noqa: SLF001
            return False
        return bool(await super().can_read_destructive())  # type: ignore[misc]  # a mixin


class _Pipeline(Pipeline):
    """A pipeline that clears its reference to its connection even if `reset` is cancelled while it waits for a queue
    that does not reply. redis-py's pipeline would keep the reference. The connection does not stay open: only `end` in
    `_close` cancels `reset`, and `_close` then closes all connections of the pool."""

    async def reset(self) -> None:
        try:
            await super().reset()  # type: ignore[no-untyped-call]  # redis-py has no types
        finally:
            self.connection = None


class _Redis(ArqRedis):
    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def _client(url: str, name: str) -> ArqRedis:
    """A client without a socket timeout: redis-py's timers and tasks for timeouts would cost more CPU than the jobs."""
    connections = blocking_pool(url, BLOCKING_S, MAX_JOBS + 2)
    connections.connection_kwargs["socket_timeout"] = None
    connections.connection_class = type("Lean", (_Lean, connections.connection_class), {})
    return client(connections, name, _Redis)


async def _close(worker: _Worker, running: asyncio.Task[None]) -> None:
    """Close the worker: wait for the end of the current poll, let jobs finish for up to `STOP_GRACE_S` seconds, and
    cancel the rest, which arq retries. Why the poll must end: 1. arq marks a job as taken; 2. the poll is cancelled
    before the job has started; 3. no worker runs the job until the mark expires, long after the job's timeout."""
    worker.allow_pick_jobs = False
    worker.poll_ended.clear()
    polled = asyncio.create_task(worker.poll_ended.wait())
    await asyncio.wait({running, polled}, timeout=SILENT_S, return_when=asyncio.FIRST_COMPLETED)
    polled.cancel()
    jobs = list(worker.tasks.values())
    if jobs:
        await asyncio.wait(jobs, timeout=STOP_GRACE_S)
    await end([running, *jobs])
    try:
        async with asyncio.timeout(BLOCKING_S):
            await worker.pool.delete(worker.health_check_key)
    except AWAY as error:
        log.debug("health_key_left", error=str(error))  # it expires
    await worker.pool.aclose(close_connection_pool=True)
