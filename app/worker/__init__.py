"""Composition root of the arq worker: `WorkerSettings`, thin jobs, and the sweep.

A job only translates: arguments in, `Retry` out if a server does not answer (`app.worker.retry`). `work` keeps going:
arq's own worker dies when its Redis disconnects. The sweep runs beside arq, not as one of its jobs, so that
events are consumed while the queue is away, too.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import Any, cast

import uvloop
from arq.connections import RedisSettings
from arq.cron import CronJob, cron
from arq.worker import func

from app.bandit.learning import maintenance
from app.bandit.rollout import monitor
from app.bandit.rollout.monitor import RolloutWatch
from app.bootstrap.health import sampling
from app.bootstrap.service import Service, open_service
from app.concurrency.periodic import repeat
from app.concurrency.tasks import end
from app.errors import InvalidInput, SettingsError
from app.events.handover import Handover
from app.events.ports import Learner
from app.profiles.consistency.monitor import ROUND_S, ConsistencyMonitor
from app.settings import Settings
from app.stores.queue import client
from app.stores.queue.large_jobs import LargeJob, Position
from app.stores.queue.worker import STOP_GRACE_S, Pace, keep_working
from app.telemetry import configure_logging, logger, serve_metrics
from app.worker.retry import Context, carried_out, come_back, context, pace_of, service_of

FOR_EVER = 1_000_000_000
SWEEP_EVERY_S = 2.0
HOURLY = "the worker, hourly"
log = logger("worker")


async def tip_events(ctx: Context, events: object) -> None:
    """The queue's door: a list of the same payloads that `POST /events` takes."""

    async def bury(reason: str) -> None:
        await service_of(ctx).queue_door.bury(events, reason)

    await carried_out(ctx, client.TIP_EVENTS, _take_in(ctx, events), bury)


async def _take_in(ctx: Context, events: object) -> None:
    service = service_of(ctx)
    seqs = await service.queue_door.take_in(events)
    enqueued_at = ctx.get("enqueue_time")
    if isinstance(enqueued_at, datetime) and enqueued_at.timestamp() > 0:
        lag_s = (datetime.now(UTC) - enqueued_at).total_seconds()
        service.metrics.queue_door_lag.observe(max(0.0, lag_s))
    cast(Handover, ctx["handover"]).add(seqs)  # stored and invalidated: the job is done


async def large_tip_events(ctx: Context, at: int, taken: int, events: int) -> None:
    """A `tip_events` job that was set aside: some pieces of it; the job comes back at once while there is more."""
    position, job = Position(at, taken, events), LargeJob(ctx["redis"], str(ctx["job_id"]))

    async def bury(reason: str) -> None:
        await service_of(ctx).queue_door.bury(f"a job of {events} events; {taken} or more of them are stored", reason)
        await job.forget()

    await carried_out(ctx, client.LARGE_TIP_EVENTS, _take_in_pieces(ctx, job, position, bury), bury)


async def _take_in_pieces(
    ctx: Context, job: LargeJob, position: Position, bury: Callable[[str], Awaitable[None]]
) -> None:
    service = service_of(ctx)
    until = service.clock.monotonic() + pace_of(ctx).budget_s
    while position.taken < position.events:
        try:
            piece, following = await job.read(position)
        except InvalidInput as error:
            await bury(str(error))
            return
        cast(Handover, ctx["handover"]).add(await service.queue_door.take_in(piece, position.taken))
        position = following
        await job.move(position)
        if service.clock.monotonic() > until:
            come_back(ctx, client.LARGE_TIP_EVENTS)
    await job.forget()


async def consume_events(ctx: Context, seqs: list[int]) -> None:
    """Events that an API process stored and invalidated."""
    await carried_out(ctx, client.CONSUME, service_of(ctx).consumer.consume(seqs))


async def run_rebuild(ctx: Context, run_id: str) -> None:
    """A piece of a rebuild; the job comes back at once while there is more."""

    async def fail(reason: str) -> None:
        service = service_of(ctx)
        await service.book.finish(run_id, "failed", service.clock.now_ms(), reason)

    await carried_out(ctx, client.REBUILD, _rebuild(ctx, run_id), fail)


async def _rebuild(ctx: Context, run_id: str) -> None:
    if not await service_of(ctx).runner.run(run_id, pace_of(ctx).budget_s):
        come_back(ctx, client.REBUILD)


async def bury_job(ctx: Context, payload: object, reason: str) -> None:
    """A job that is no job of ours: kept for an admin."""
    await carried_out(ctx, client.BURY, service_of(ctx).queue_door.bury(payload, reason))


async def prune(ctx: Context) -> None:
    """Nightly: events and decisions older than their retention go, piece by piece."""
    await carried_out(ctx, client.PRUNE, _prune(ctx))


async def _prune(ctx: Context) -> None:
    again = int(ctx.get("job_try") or 1) > 1  # the cutoff moves once a night, however many pieces the night takes
    if await service_of(ctx).retention.prune(asyncio.sleep, pace_of(ctx).budget_s, go_on=again) is None:
        come_back(ctx, client.PRUNE)


async def measure_quality(ctx: Context, run_id: int) -> None:
    """A run of data quality, in one job."""

    async def fail(reason: str) -> None:
        service = service_of(ctx)
        await service.quality.runs.finish(run_id, "failed", service.clock.now_ms(), error=reason)

    work = service_of(ctx).quality.carry_out(run_id, 0.8 * pace_of(ctx).work_s)
    await carried_out(ctx, client.QUALITY, work, fail)


async def hourly_quality(ctx: Context) -> None:
    """Every hour: a report, unless one is under way."""
    await carried_out(ctx, client.HOURLY_QUALITY, _ask_for_quality(service_of(ctx)))


async def _ask_for_quality(service: Service) -> None:
    run, _ = await service.quality.runs.open(HOURLY, service.clock.now_ms())
    await service.quality.start(run.id)


async def sweep(service: Service, pace: Pace) -> None:
    """Consume events that stayed unconsumed, and restart runs that have lost their job. Raises `Unavailable`."""
    await service.consumer.sweep()
    if service.queue is None:
        return
    now_ms = service.clock.now_ms()
    await service.queue.show_database(service.database.id, now_ms)
    before_ms, after_ms = now_ms - pace.untouched_ms, now_ms + pace.untouched_ms
    for run_id in await service.book.untouched(before_ms, after_ms):
        await service.queue.start_rebuild(run_id)
    for quality_id in await service.quality.runs.untouched(before_ms, after_ms):
        await service.quality.start(quality_id)


def watch(service: Service) -> ConsistencyMonitor:
    """The running audit of this worker."""
    return ConsistencyMonitor(
        checker=service.checker,
        users_per_s=service.settings.audit_users,
        random=Random(),  # noqa: S311  # a sample, no secret
        clock=service.clock,
        metrics=service.metrics,
    )


FUNCTIONS = tuple(
    func(cast(Any, job), name=name, max_tries=FOR_EVER)
    for name, job in (
        (client.TIP_EVENTS, tip_events),
        (client.LARGE_TIP_EVENTS, large_tip_events),
        (client.CONSUME, consume_events),
        (client.REBUILD, run_rebuild),
        (client.QUALITY, measure_quality),
        (client.BURY, bury_job),
    )
)


def crons(pace: Pace, queue_name: str = client.QUEUE) -> list[CronJob]:
    """Nightly pruning, before the day begins in Europe, and an hourly report of data quality."""
    nightly, hourly = (client.own_name(name, queue_name) for name in (client.PRUNE, client.HOURLY_QUALITY))
    return [
        cron(prune, name=nightly, hour=3, minute=17, timeout=pace.job_timeout_s, max_tries=FOR_EVER),
        cron(hourly_quality, name=hourly, minute=41, timeout=pace.job_timeout_s, max_tries=FOR_EVER),
    ]


def __getattr__(name: str) -> type:
    """`WorkerSettings`, read from the environment for `arq --check app.worker.WorkerSettings`."""
    if name != "WorkerSettings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = Settings.from_environment()
    settings.require_servers()
    assert settings.queue_url is not None

    async def refuse(_: object) -> None:
        raise SettingsError("WorkerSettings", "serves `arq --check`; run the worker with `profiles worker`")

    attributes = {
        "functions": FUNCTIONS,
        "redis_settings": RedisSettings.from_dsn(settings.queue_url),
        "queue_name": settings.queue_name,
        "health_check_key": client.health_key(settings.queue_name),
        "on_startup": refuse,
    }
    return type(name, (), attributes)


async def work(
    settings: Settings,
    stop: asyncio.Event,
    *,
    pace: Pace | None = None,
    learners: Sequence[Learner] = (),
    on_ready: Callable[[Service], None] = lambda _: None,
) -> None:
    """Work until `stop` is set; begin again whenever the queue goes away.

    Raises:
        ProfilesError: whatever forbids to start.
    """
    settings.require_servers()
    assert settings.queue_url is not None
    pace = pace or Pace()
    async with open_service(settings, door="queue", learners=learners) as service, sampling(service, "worker"):
        stop_metrics = serve_metrics(service.metrics, settings.host, settings.worker_metrics_port)
        background = [
            asyncio.create_task(repeat("sweep", partial(sweep, service, pace), SWEEP_EVERY_S)),
            asyncio.create_task(repeat("bandit maintenance", service.bandit.upkeep.once, maintenance.EVERY_S)),
            asyncio.create_task(
                repeat("roll-out", RolloutWatch(service.bandit.rollout, service.clock).once, monitor.EVERY_S)
            ),
        ]
        if settings.audit_users:
            background.append(asyncio.create_task(repeat("audit", watch(service).round, ROUND_S)))
        ctx = context(service, pace)
        try:
            log.info("worker_started", database=str(settings.database))
            on_ready(service)
            await keep_working(
                settings.queue_url,
                settings.queue_name,
                stop,
                functions=FUNCTIONS,
                crons=crons(pace, settings.queue_name),
                pace=pace,
                context=ctx,
            )
        finally:
            await ctx["handover"].close(STOP_GRACE_S)
            await end(background)
            await asyncio.to_thread(stop_metrics)
    log.info("worker_stopped")


def run(settings: Settings, *, pace: Pace | None = None, learners: Sequence[Learner] = ()) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    configure_logging(settings.log_format, settings.log_level)

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(settings, stop, pace=pace, learners=learners)

    sys.setswitchinterval(0.0005)  # by default, a busy event loop keeps the database's threads waiting 5 ms at a time
    uvloop.run(main())
