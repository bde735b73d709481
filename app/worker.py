"""Composition root of the arq worker: `WorkerSettings`, and thin jobs.

A job only translates: arguments in, `Retry` out where something outside does not answer. arq drops a job that raises
anything else, and forgets one it has tried `max_tries` times; an event must survive both, so jobs raise nothing but
`Retry`, and may be tried for ever. `run` keeps a worker going: arq's own dies when its Redis disconnects.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, cast

from arq.cron import CronJob, cron
from arq.worker import Retry, Worker, func
from prometheus_client import start_http_server

from app.assembly import Service, open_service
from app.errors import SettingsError, Unavailable
from app.events import retention
from app.settings import Settings
from app.stores import queue
from app.telemetry import configure_logging, logger

JOB_TIMEOUT_S = 20
JOB_BUDGET_S = 10.0
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
UNEXPECTED_TRIES = 5
FOR_EVER = 1_000_000_000
REBUILD_UNTOUCHED_MS = 40_000
STOP_GRACE_S = 10.0
RESTART_AFTER_S = 0.5
log = logger("worker")

Context = dict[str, Any]


def _service(ctx: Context) -> Service:
    return cast(Service, ctx["service"])


def back_off(tries: int) -> float:
    """Seconds before try `tries` + 1: doubling, up to a bound."""
    return float(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(tries - 1, 10)))


async def _carried_out(ctx: Context, name: str, work: Awaitable[object]) -> None:
    """Run a job's work within its time; whatever goes wrong becomes a `Retry`."""
    service = _service(ctx)
    tries = int(ctx.get("job_try") or 1)
    try:
        async with asyncio.timeout(JOB_TIMEOUT_S - 2):
            await work
    except Retry:
        service.metrics.jobs.labels(name, "continued").inc()
        raise
    except (Unavailable, TimeoutError) as error:
        service.metrics.jobs.labels(name, "retried").inc()
        log.warning("job_retried", job=name, tries=tries, error=str(error) or type(error).__name__)
        raise Retry(defer=back_off(tries)) from error
    except Exception as error:
        service.metrics.jobs.labels(name, "failed").inc()
        log.exception("job_failed", job=name, tries=tries)
        raise Retry(defer=back_off(tries)) from error
    service.metrics.jobs.labels(name, "done").inc()


async def tip_events(ctx: Context, events: object) -> None:
    """The queue's door: a list of the same payloads that `POST /events` takes."""
    await _carried_out(ctx, queue.TIP_EVENTS, _take_in(ctx, events))


async def _take_in(ctx: Context, events: object) -> None:
    service = _service(ctx)
    try:
        seqs = await service.queue_door.take_in(events)
    except Unavailable:
        raise
    except Exception as error:
        if int(ctx.get("job_try") or 1) < UNEXPECTED_TRIES:
            raise
        await service.queue_door.bury(events, f"the job failed {UNEXPECTED_TRIES} times: {error!r}")
        return
    enqueued_at = ctx.get("enqueue_time")
    if isinstance(enqueued_at, datetime):
        lag_s = (datetime.now(UTC) - enqueued_at).total_seconds()
        service.metrics.queue_door_lag.observe(max(0.0, lag_s))
    await service.consumer.consume(seqs)


async def consume_events(ctx: Context, seqs: list[int]) -> None:
    """Events that an API process stored and invalidated."""
    await _carried_out(ctx, queue.CONSUME, _service(ctx).consumer.consume(seqs))


async def run_rebuild(ctx: Context, run_id: str) -> None:
    """A piece of a rebuild; the job comes back at once while there is more."""
    await _carried_out(ctx, queue.REBUILD, _rebuild(ctx, run_id))


async def _rebuild(ctx: Context, run_id: str) -> None:
    if not await _service(ctx).runner.run(run_id, JOB_BUDGET_S):
        raise Retry(defer=0)


async def bury_job(ctx: Context, raw: str, reason: str) -> None:
    """A job that is no job of ours: kept for an admin."""
    text = base64.b64decode(raw).decode("utf-8", "backslashreplace")
    await _carried_out(ctx, queue.BURY, _service(ctx).queue_door.bury(text, reason))


async def sweep(ctx: Context) -> None:
    """Take up whatever stayed unconsumed, and rebuild runs that nobody carries on."""
    service = _service(ctx)
    try:
        await service.consumer.sweep()
        for run_id in await service.book.untouched(service.clock.now_ms() - REBUILD_UNTOUCHED_MS):
            if service.queue is not None:
                await service.queue.start_rebuild(run_id)
    except Unavailable as error:
        log.warning("sweep_failed", error=str(error))


async def prune(ctx: Context) -> None:
    """Nightly: events older than the retention go."""
    service = _service(ctx)
    try:
        await retention.prune(service.log, service.clock, service.settings.retention_days, asyncio.sleep)
    except Unavailable as error:
        log.warning("prune_failed", error=str(error))


def _crons() -> list[CronJob]:
    return [
        cron(sweep, name="cron:sweep", second=set(range(0, 60, 2)), run_at_startup=True, timeout=JOB_TIMEOUT_S),
        cron(prune, name="cron:prune", hour=3, minute=17, timeout=3600),
    ]


class WorkerSettings:
    """What arq needs; `run` adds the connection and the service."""

    functions = tuple(
        func(cast(Any, job), name=name, max_tries=FOR_EVER)
        for name, job in (
            (queue.TIP_EVENTS, tip_events),
            (queue.CONSUME, consume_events),
            (queue.REBUILD, run_rebuild),
            (queue.BURY, bury_job),
        )
    )
    queue_name = queue.QUEUE
    poll_delay = 0.01
    job_timeout = JOB_TIMEOUT_S
    max_jobs = 10
    keep_result = 0
    health_check_interval = 2
    health_check_key = queue.HEALTH_KEY


def _worker(settings: Settings, service: Service) -> Worker:
    assert settings.queue_url is not None
    return Worker(
        functions=WorkerSettings.functions,
        cron_jobs=_crons(),
        redis_pool=queue.connect(settings.queue_url, blocking_s=2.0),
        queue_name=WorkerSettings.queue_name,
        poll_delay=WorkerSettings.poll_delay,
        job_timeout=WorkerSettings.job_timeout,
        max_jobs=WorkerSettings.max_jobs,
        keep_result=WorkerSettings.keep_result,
        health_check_interval=WorkerSettings.health_check_interval,
        health_check_key=WorkerSettings.health_check_key,
        handle_signals=False,
        job_serializer=queue.serialize,
        job_deserializer=queue.deserialize,
        ctx={"service": service},
        timezone=UTC,
        log_results=False,
    )


async def work(settings: Settings, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
    """Work until `stop` is set; begin again whenever the queue goes away."""
    settings.require_servers()
    async with open_service(settings, door="queue") as service:
        stop_metrics = _serve_metrics(settings, service)
        log.info("worker_started", database=str(settings.database))
        on_ready()
        while not stop.is_set():
            worker = _worker(settings, service)
            running = asyncio.create_task(worker.async_run())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                log.warning("queue_lost", error=str(running.exception()))
                await _outcome(stopping, RESTART_AFTER_S)
            stopping.cancel()
            await _close(worker, running)
        stop_metrics()
    log.info("worker_stopped")


def _serve_metrics(settings: Settings, service: Service) -> Callable[[], None]:
    """Serve this process's metrics where the setting says; the function returned stops that."""
    if settings.worker_metrics_port == 0:
        return lambda: None
    try:
        server, thread = start_http_server(
            settings.worker_metrics_port, addr=settings.host, registry=service.metrics.collectors
        )
    except OSError as error:
        raise SettingsError(
            "PROFILES_WORKER_METRICS_PORT", f"cannot serve on port {settings.worker_metrics_port}: {error}"
        ) from error

    def stop_serving() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop_serving


async def _outcome(stopping: asyncio.Task[bool], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(stopping), timeout_s)


async def _close(worker: Worker, running: asyncio.Task[None]) -> None:
    """Let jobs finish, then close; with the queue away, whatever is left comes back by itself."""
    worker.allow_pick_jobs = False
    jobs = [task for task in worker.tasks.values() if not task.done()]
    if jobs:
        await asyncio.wait(jobs, timeout=STOP_GRACE_S)
    running.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await running
    try:
        await worker.close()
    except (Exception, asyncio.CancelledError) as error:
        log.debug("worker_close_failed", error=str(error))


def run(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    configure_logging(settings.log_format, settings.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await work(settings, stop)

    asyncio.run(main())
