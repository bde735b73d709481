"""The worker process: arq jobs, the periodic work beside them, and `WorkerSettings`.

A job only passes its arguments to the service. arq drops a job that raises anything but `Retry`, and a job that was
tried `max_tries` times. No event may be lost in this way, so jobs raise only `Retry` and have no limit of tries. The
sweep, which consumes events whose job was lost, is not an arq job, so that it also runs while the queue is unavailable.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial, wraps
from random import Random
from typing import Any, NotRequired, TypedDict, cast

import uvloop
from arq.connections import RedisSettings
from arq.cron import CronJob, cron
from arq.worker import Retry, func

from app.bootstrap.health import sampling
from app.bootstrap.service import OpenService, open_service
from app.concurrency.batcher import Handover
from app.concurrency.tasks import repeat, running, stop_signals
from app.errors import SettingsError, Unavailable
from app.events.consume import BOUNDS
from app.profiles.consistency.checker import ROUND_S, ConsistencyMonitor
from app.profiles.consistency.decisions import DecisionMonitor
from app.settings import Settings
from app.stores.queue import client, jobs
from app.stores.queue.worker import STOP_GRACE_S, Pace, keep_working
from app.telemetry import configure_logging, logger, serve_metrics, warn

FOR_EVER = 1_000_000_000
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
UNEXPECTED_TRIES = 5
SWEEP_EVERY_S = 2.0
SHARE_EVERY_S = 2.0
HOURLY = "the worker, hourly"
log = logger("worker")


class JobContext(TypedDict):
    """The context that arq passes to every job. `failures` counts unexpected errors by job id."""

    service: OpenService
    pace: Pace
    handover: Handover[int]
    failures: Counter[str]
    job_id: NotRequired[str]
    job_try: NotRequired[int]
    enqueue_time: NotRequired[datetime]


class Unfinished(Exception):
    """Raised by a job whose try has no time left: the job continues in another try at once."""


def context(service: OpenService, pace: Pace) -> JobContext:
    handover = Handover(partial(service.consumer.consume_within, pace.work_s), BOUNDS)
    return {"service": service, "pace": pace, "handover": handover, "failures": Counter()}


def back_off(tries: int) -> float:
    """The delay in seconds before try `tries` + 1: it doubles up to `RETRY_MOST_S`."""
    return float(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(tries - 1, 10)))


def job(
    name: str, give_up: Callable[..., Awaitable[None]] | None = None
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Coroutine[Any, Any, None]]]:
    """Decorate a coroutine function as the arq job `name`, which raises only `Retry`.

    `Unavailable` and timeouts are retried without limit. After `UNEXPECTED_TRIES` other errors of one job, `give_up` is
    called with the context, the reason and the arguments of the job, and the job ends.
    """

    def decorate(work: Callable[..., Awaitable[None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        @wraps(work)
        async def run(ctx: JobContext, *arguments: object, traceparent: object = None) -> None:  # for `Tracing.job`
            tries, job_id = int(ctx.get("job_try") or 1), str(ctx.get("job_id"))
            count, failures = ctx["service"].metrics.jobs.labels, ctx["failures"]
            try:
                try:
                    async with asyncio.timeout(ctx["pace"].work_s):
                        await work(ctx, *arguments)
                except (Unfinished, Unavailable, TimeoutError):
                    raise
                except Exception as error:
                    failures[job_id] += 1
                    log.exception("job_failed", job=name, tries=tries)
                    if failures[job_id] < UNEXPECTED_TRIES:
                        count(name, "failed").inc()
                        raise Retry(defer=back_off(tries)) from error
                    if give_up is not None:
                        await give_up(ctx, f"the job failed {UNEXPECTED_TRIES} times: {error!r}", *arguments)
                    count(name, "given up").inc()
                else:
                    count(name, "done").inc()
                failures.pop(job_id, None)
            except Unfinished as unfinished:
                count(name, "continued").inc()
                raise Retry(defer=0) from unfinished
            except (Unavailable, TimeoutError) as error:
                count(name, "retried").inc()
                warn(log, error)("job_retried", job=name, tries=tries, error=str(error) or type(error).__name__)
                raise Retry(defer=back_off(tries)) from error

        return run

    return decorate


@job(jobs.TIP_EVENTS, lambda ctx, reason, events: ctx["service"].queue_door.bury([(events, reason)]))
async def tip_events(ctx: JobContext, events: object) -> None:
    """Job: store tip events. `events` should be a list of the payloads that `POST /events` accepts."""
    service = ctx["service"]
    seqs = await service.queue_door.take_in(events)
    enqueued_at = ctx.get("enqueue_time")
    if isinstance(enqueued_at, datetime) and enqueued_at.timestamp() > 0:
        lag_s = (datetime.now(UTC) - enqueued_at).total_seconds()
        service.metrics.queue_door_lag.observe(max(0.0, lag_s))
    ctx["handover"].add(seqs)  # the job is done once its events are stored and invalidated


@job(jobs.CONSUME)
async def consume_events(ctx: JobContext, seqs: list[int]) -> None:
    """Job: consume the events with these sequence numbers, which an API process has stored."""
    await ctx["service"].consumer.consume(seqs)


async def _fail_rebuild(ctx: JobContext, reason: str, run_id: str) -> None:
    service = ctx["service"]
    await service.rebuild_runs.finish(run_id, "failed", service.clock.now_ms(), reason)


@job(jobs.REBUILD, _fail_rebuild)
async def run_rebuild(ctx: JobContext, run_id: str) -> None:
    """Job: rebuild as many users of a rebuild run as one try has time for; the next try continues."""
    if not await ctx["service"].rebuild_runner.run(run_id, ctx["pace"].budget_s):
        raise Unfinished


@job(jobs.BURY)
async def bury_job(ctx: JobContext, payload: object, reason: str) -> None:
    """Job: store as a dead letter a queued job that this service does not recognize."""
    await ctx["service"].queue_door.bury([(payload, reason)])


@job(jobs.NIGHTLY_PRUNE)
async def nightly_prune(ctx: JobContext) -> None:
    """Nightly job: enqueue the deletion of events and decisions that are older than their retention."""
    service = ctx["service"]
    assert service.queue is not None
    await service.queue.start_prune(await service.retention.next_cutoffs())


@job(jobs.PRUNE)
async def prune(ctx: JobContext, cutoffs: dict[str, int]) -> None:
    """Job: delete the rows before these cutoffs, as many as one try has time for; the next try continues."""
    if await ctx["service"].retention.prune(cutoffs, asyncio.sleep, ctx["pace"].budget_s) is None:
        raise Unfinished


async def _fail_quality(ctx: JobContext, reason: str, run_id: int) -> None:
    service = ctx["service"]
    await service.quality.runs.finish(run_id, "failed", service.clock.now_ms(), error=reason)


@job(jobs.QUALITY, _fail_quality)
async def measure_quality(ctx: JobContext, run_id: int) -> None:
    """Job: measure data quality for a requested run, and store the report."""
    await ctx["service"].quality.carry_out(run_id, 0.8 * ctx["pace"].work_s)


@job(jobs.HOURLY_QUALITY)
async def hourly_quality(ctx: JobContext) -> None:
    """Hourly job: request a data-quality measurement, unless one is active."""
    service = ctx["service"]
    run, _ = await service.quality.runs.open(HOURLY, service.clock.now_ms())
    await service.quality.start(run.id)


async def sweep(service: OpenService, pace: Pace) -> None:
    """Consume events whose job was lost; queue stalled rebuilds and data-quality runs again. Raises `Unavailable`."""
    await service.consumer.sweep()
    if service.queue is None:
        return
    now_ms = service.clock.now_ms()
    await service.queue.show_database(service.database.id, now_ms)
    before_ms, after_ms = now_ms - pace.untouched_ms, now_ms + pace.untouched_ms
    for run_id in await service.rebuild_runs.untouched(before_ms, after_ms):
        await service.start_rebuild(run_id)
    for quality_id in await service.quality.runs.untouched(before_ms, after_ms):
        await service.quality.start(quality_id)


# arq names each by its function, as `app.stores.queue.jobs` does.
FUNCTIONS = [
    func(cast(Any, each), max_tries=FOR_EVER)
    for each in (tip_events, consume_events, run_rebuild, measure_quality, bury_job, prune)
]


def crons(pace: Pace, queue_name: str = client.QUEUE) -> list[CronJob]:
    """The scheduled jobs: pruning at 3:17 UTC, before the day begins in Europe, and data quality every hour. They only
    enqueue other jobs, because arq lets no scheduled job run again within a minute, not even to retry it."""
    nightly, hourly = (client.own_name(name, queue_name) for name in (jobs.NIGHTLY_PRUNE, jobs.HOURLY_QUALITY))
    return [
        cron(nightly_prune, name=nightly, hour=3, minute=17, timeout=pace.job_timeout_s, max_tries=FOR_EVER),
        cron(hourly_quality, name=hourly, minute=41, timeout=pace.job_timeout_s, max_tries=FOR_EVER),
    ]


def __getattr__(name: str) -> type:
    """Create `WorkerSettings` from the environment on first use, for `arq --check app.worker.WorkerSettings`."""
    if name != "WorkerSettings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = Settings.from_environment()
    settings.require_servers()
    assert settings.queue_url is not None

    async def refuse(_: object) -> None:
        raise SettingsError("WorkerSettings", "is for `arq --check` only; run the worker with `profiles worker`")

    attributes = {
        "functions": FUNCTIONS,
        "redis_settings": RedisSettings.from_dsn(settings.queue_url),
        "queue_name": settings.queue_name,
        "health_check_key": settings.queue_name + client.HEALTH_SUFFIX,
        "on_startup": refuse,
    }
    return type(name, (), attributes)


async def work(
    settings: Settings,
    stop: asyncio.Event,
    *,
    pace: Pace | None = None,
    on_ready: Callable[[OpenService], object] = lambda _: None,
) -> None:
    """Run jobs and periodic work until `stop` is set. `on_ready` is called with the service before the first job.

    While the queue is unavailable, only periodic work runs; arq's worker is restarted afterwards.

    Raises:
        ProfilesError: the worker cannot start.
    """
    settings.require_servers()
    assert settings.queue_url is not None
    pace = pace or Pace()
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(open_service(settings, door="queue"))
        await stack.enter_async_context(sampling(service, "worker"))
        stop_metrics = serve_metrics(
            service.metrics, settings.host, settings.worker_metrics_port, "PROFILES_WORKER_METRICS_PORT"
        )
        stack.push_async_callback(asyncio.to_thread, stop_metrics)
        periodic = [
            repeat("sweep", partial(sweep, service, pace), SWEEP_EVERY_S),
            repeat("rebuild", partial(service.rebuild_runner.share, pace.budget_s), SHARE_EVERY_S),
            *(repeat(*work) for work in (service.scoring.periodic if service.scoring is not None else ())),
        ]
        if settings.audit_users:
            sample = Random()  # noqa: S311  # draws a sample
            profiles = ConsistencyMonitor(service.checker, settings.audit_users, sample)
            decisions = DecisionMonitor(service.decision_checker, settings.audit_users, sample)
            periodic.append(repeat("audit", profiles.round, ROUND_S))
            periodic.append(repeat("decision audit", decisions.round, ROUND_S))
        await stack.enter_async_context(running(*periodic))
        functions = FUNCTIONS
        if (tracing := service.tracing) is not None:
            functions = [replace(each, coroutine=tracing.job(each.name, each.coroutine)) for each in FUNCTIONS]
        ctx = context(service, pace)
        stack.push_async_callback(ctx["handover"].close, STOP_GRACE_S)
        log.info("worker_started", database=str(settings.database))
        on_ready(service)
        await keep_working(
            settings.queue_url,
            settings.queue_name,
            pace,
            stop,
            functions=functions,
            cron_jobs=crons(pace, settings.queue_name),
            ctx=ctx,
        )
    log.info("worker_stopped")


def run(
    settings: Settings, *, pace: Pace | None = None, on_ready: Callable[[OpenService], object] = lambda _: None
) -> None:
    """Run a worker until SIGTERM, SIGINT or SIGHUP; see `work`."""
    configure_logging(settings.log_format, settings.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(settings, stop, pace=pace, on_ready=on_ready)

    sys.setswitchinterval(0.0005)  # by default, a busy event loop makes the database's threads wait 5 ms at a time
    uvloop.run(main())
