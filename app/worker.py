"""The worker process: arq jobs, the periodic work beside them, and `WorkerSettings`.

A job only passes its arguments to the service. arq drops a job that raises anything but `Retry`, and a job that was
tried `max_tries` times. No event may be lost in this way, so jobs raise only `Retry` and have no limit of tries.
Periodic work finds its tasks in the database: events whose job was lost, and open runs, which are rebuilds and
measurements of data quality. So it continues while the queue is unavailable.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial, wraps
from random import Random
from typing import Any, TypeVar, cast

import uvloop
from arq.connections import RedisSettings
from arq.worker import Retry, func

from app.bootstrap.health import sampling
from app.bootstrap.service import OpenService, open_service
from app.concurrency.batcher import Handover
from app.concurrency.tasks import repeat, running, stop_signals
from app.errors import SettingsError, Unavailable
from app.events.consume import BOUNDS
from app.features.clock import DAY_MS, HOUR_MS
from app.profiles.consistency.checker import ROUND_S, ConsistencyMonitor
from app.profiles.consistency.decisions import DecisionMonitor
from app.profiles.quality.report import KEPT, QualityRepository
from app.profiles.rebuild import RebuildRepository
from app.settings import Settings
from app.stores.queue import client, jobs
from app.stores.queue.worker import STOP_GRACE_S, keep_working
from app.telemetry import configure_logging, logger, serve_metrics, warn

FOR_EVER = 1_000_000_000
JOB_TIMEOUT_S = 20.0
WORK_S = 0.9 * JOB_TIMEOUT_S  # a job stops itself before arq cancels it
UNEXPECTED_TRIES = 5
SWEEP_EVERY_S = 2.0
LOOK_EVERY_S = 1.0  # for open runs
TURN_S = 1.0  # of work on one rebuild, before the next one has its turn
MEASURE_S = 14.0
PRUNE_EVERY_S = 60.0
# Data quality is measured 41 minutes after each hour. Pruning begins at 3:17 UTC, before the day begins in Europe.
HOURLY_MS, NIGHT_MS = 41 * 60_000, 197 * 60_000
WINDOW_MS = 600_000  # for how long after these times the work can still begin, if no worker was ready
HOURLY = "the worker, hourly"
JobContext = dict[str, Any]  # what arq passes to every job: that of `context`, and the job's id, try and time
T = TypeVar("T")
log = logger("worker")


def context(service: OpenService) -> JobContext:
    """The context of jobs and runs. `failures` counts unexpected errors by the id of the job or run."""
    handover = Handover(partial(service.consumer.consume_within, WORK_S), BOUNDS)
    return {"service": service, "handover": handover, "failures": Counter[object]()}


def back_off(tries: int) -> float:
    """The delay before try `tries` + 1: it doubles from 0.2 seconds up to 5."""
    return float(min(5.0, 0.2 * 2 ** min(tries - 1, 10)))


def job(work: Callable[..., Awaitable[None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """Wrap a coroutine function as an arq job of the same name. `Unavailable` and timeouts are retried without limit.
    After `UNEXPECTED_TRIES` other errors the job ends, and the events of a `tip_events` job become a dead letter."""
    name = work.__name__

    @wraps(work)
    async def run(ctx: JobContext, *arguments: object, traceparent: object = None) -> None:  # for `Tracing.job`
        tries, job_id = int(ctx.get("job_try") or 1), str(ctx.get("job_id"))
        count, failures = ctx["service"].metrics.jobs.labels, ctx["failures"]
        try:
            try:
                async with asyncio.timeout(WORK_S):
                    await work(ctx, *arguments)
                outcome = "done"
            except (Unavailable, TimeoutError):
                raise
            except Exception as error:
                failures[job_id] += 1
                log.exception("job_failed", job=name, tries=tries)
                if failures[job_id] < UNEXPECTED_TRIES:
                    count(name, "failed").inc()
                    raise Retry(defer=back_off(tries)) from error
                if name == jobs.TIP_EVENTS:
                    reason = f"the job failed {UNEXPECTED_TRIES} times: {error!r}"
                    await ctx["service"].queue_door.bury([(arguments[0], reason)])
                outcome = "given up"
            count(name, outcome).inc()
            failures.pop(job_id, None)
        except (Unavailable, TimeoutError) as error:
            count(name, "retried").inc()
            warn(log, error)("job_retried", job=name, tries=tries, error=str(error) or type(error).__name__)
            raise Retry(defer=back_off(tries)) from error

    return run


@job
async def tip_events(ctx: JobContext, events: object) -> None:
    """Job: store tip events. `events` should be a list of the payloads that `POST /events` accepts."""
    service: OpenService = ctx["service"]
    seqs = await service.queue_door.take_in(events)
    enqueued_at = ctx.get("enqueue_time")
    if isinstance(enqueued_at, datetime) and enqueued_at.timestamp() > 0:
        lag_s = (datetime.now(UTC) - enqueued_at).total_seconds()
        service.metrics.queue_door_lag.observe(max(0.0, lag_s))
    ctx["handover"].add(seqs)  # the job is done once its events are stored and invalidated


@job
async def consume_events(ctx: JobContext, seqs: list[int]) -> None:
    """Job: consume the events with these sequence numbers, which an API process has stored."""
    await ctx["service"].consumer.consume(seqs)


@job
async def bury_job(ctx: JobContext, payload: object, reason: str) -> None:
    """Job: store as a dead letter a queued job that this service does not recognize."""
    await ctx["service"].queue_door.bury([(payload, reason)])


# arq names each by its function, as `app.stores.queue.jobs` does.
FUNCTIONS = [func(cast(Any, each), max_tries=FOR_EVER) for each in (tip_events, consume_events, bury_job)]


async def sweep(service: OpenService) -> None:
    """Consume events whose job was lost, and tell the queue which database this worker uses. Raises `Unavailable`."""
    await service.consumer.sweep()
    if service.queue is not None:
        await service.queue.show_database(service.database.id, service.clock.now_ms())


async def rebuild(ctx: JobContext) -> None:
    """Work on the open rebuilds in turns, until each is done or other workers work on the rest of it. If a rebuild
    fails, its error is raised after each of the others has had its turn."""
    service: OpenService = ctx["service"]
    runs, unfinished = service.rebuild_runs, True
    while unfinished:
        unfinished, errors = False, list[Exception]()
        for run_id in await runs.active():
            try:
                unfinished |= not await _attempt(ctx, runs, run_id, service.rebuild_runner.run(run_id, TURN_S))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


async def measure_quality(ctx: JobContext) -> None:
    """Carry out the requested measurement of data quality, unless another worker does. If none is requested, request
    the hourly one when it is due. Raises `Unavailable`."""
    service: OpenService = ctx["service"]
    runs, now_ms = service.quality.runs, service.clock.now_ms()
    newest = await runs.newest(KEPT)
    if newest and newest[0].active:
        run_id = newest[0].id
        await _attempt(ctx, runs, run_id, service.quality.carry_out(run_id, MEASURE_S))
    elif (now_ms - HOURLY_MS) % HOUR_MS < WINDOW_MS:
        recent = [run for run in newest if abs(now_ms - run.requested_at_ms) < HOUR_MS // 2]
        if all(run.requested_by != HOURLY for run in recent):
            await runs.open(HOURLY, now_ms)


async def _attempt(ctx: JobContext, runs: RebuildRepository | QualityRepository, run_id: Any, work: Awaitable[T]) -> T:
    """Await `work` on a run. The run fails after `UNEXPECTED_TRIES` errors other than `Unavailable`."""
    try:
        return await work
    except Unavailable:
        raise
    except Exception as error:
        ctx["failures"][run_id] += 1
        if ctx["failures"][run_id] >= UNEXPECTED_TRIES:
            reason = f"it failed {UNEXPECTED_TRIES} times: {error!r}"
            await runs.finish(run_id, "failed", ctx["service"].clock.now_ms(), error=reason)
        raise


async def prune(service: OpenService) -> None:
    """Move the cutoffs of retention, once a night in one worker. In every call, delete the rows before the cutoffs."""
    night, since_ms = divmod(service.clock.now_ms() - NIGHT_MS, DAY_MS)
    moved = since_ms < WINDOW_MS and await service.retention.move_cutoffs(night)
    await service.retention.prune(asyncio.sleep, thorough=moved)


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
    settings: Settings, stop: asyncio.Event, *, on_ready: Callable[[OpenService], object] = lambda _: None
) -> None:
    """Run jobs and periodic work until `stop` is set. While the queue is unavailable, run only periodic work. Call
    `on_ready` with the service before the first job. Raises `ProfilesError` if the worker cannot start."""
    settings.require_servers()
    assert settings.queue_url is not None
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(open_service(settings, door="queue"))
        await stack.enter_async_context(sampling(service, "worker"))
        stop_metrics = serve_metrics(
            service.metrics, settings.host, settings.worker_metrics_port, "PROFILES_WORKER_METRICS_PORT"
        )
        stack.push_async_callback(asyncio.to_thread, stop_metrics)
        ctx = context(service)
        stack.push_async_callback(ctx["handover"].close, STOP_GRACE_S)
        periodic = [
            repeat("sweep", partial(sweep, service), SWEEP_EVERY_S),
            repeat("rebuild", partial(rebuild, ctx), LOOK_EVERY_S),
            repeat("data quality", partial(measure_quality, ctx), LOOK_EVERY_S),
            repeat("pruning", partial(prune, service), PRUNE_EVERY_S),
        ]
        if service.scoring is not None:
            periodic += [repeat(*work) for work in service.scoring.periodic]
        if settings.audit_users:
            sample = Random()  # noqa: S311  # draws a sample
            profiles = ConsistencyMonitor(service.checker, settings.audit_users, sample)
            decisions = DecisionMonitor(service.decision_checker, settings.audit_users, sample)
            periodic.append(repeat("audit", profiles.round, ROUND_S))
            periodic.append(repeat("decision audit", decisions.round, ROUND_S))
        await stack.enter_async_context(running(*periodic))
        functions, tracing = FUNCTIONS, service.tracing
        if tracing is not None:
            functions = [replace(each, coroutine=tracing.job(each.name, each.coroutine)) for each in FUNCTIONS]
        log.info("worker_started", database=str(settings.database))
        on_ready(service)
        await keep_working(
            settings.queue_url, settings.queue_name, stop, functions=functions, job_timeout=JOB_TIMEOUT_S, ctx=ctx
        )
    log.info("worker_stopped")


def run(settings: Settings, *, on_ready: Callable[[OpenService], object] = lambda _: None) -> None:
    """Run a worker until SIGTERM, SIGINT or SIGHUP; see `work`."""
    configure_logging(settings.log_format, settings.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(settings, stop, on_ready=on_ready)

    sys.setswitchinterval(0.0005)  # by default, a busy event loop makes the database's threads wait 5 ms at a time
    uvloop.run(main())
