"""Composition root of the arq worker: `WorkerSettings`, thin jobs, and the sweep.

A job only translates: arguments in, `Retry` out where something outside does not answer. arq drops a job that raises
anything else, and forgets one it has tried `max_tries` times; an event must survive both, so jobs raise nothing but
`Retry`, and may be tried for ever. `work` keeps going: arq's own worker dies when its Redis disconnects. The sweep
runs beside arq, not as one of its jobs, so that events are consumed while the queue is away, too.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import uvloop
from arq.cron import CronJob, cron
from arq.worker import Retry, func

from app.assembly import Service, open_service
from app.errors import Unavailable
from app.events import retention
from app.events.handover import Handover
from app.events.ports import Learner
from app.probes import sampling
from app.settings import Settings
from app.stores import queue
from app.stores.queue_worker import STOP_GRACE_S, Pace, keep_working
from app.stores.tasks import end
from app.telemetry import configure_logging, logger, serve_metrics

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
UNEXPECTED_TRIES = 5
FOR_EVER = 1_000_000_000
SWEEP_EVERY_S = 2.0
log = logger("worker")

Context = dict[str, Any]


def _service(ctx: Context) -> Service:
    return cast(Service, ctx["service"])


def _pace(ctx: Context) -> Pace:
    return cast(Pace, ctx["pace"])


def context(service: Service, pace: Pace) -> Context:
    """What every job is given; `failures` counts, per job, errors that nobody expected."""
    handover = Handover(service.consumer, pace.work_s)
    return {"service": service, "pace": pace, "handover": handover, "failures": Counter()}


def back_off(tries: int) -> float:
    """Seconds before try `tries` + 1: doubling, up to a bound."""
    return float(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(tries - 1, 10)))


async def _nothing(_: str) -> None:
    """Give up without a word: the sweep, or the next night, makes good for it."""


async def _carried_out(
    ctx: Context, name: str, work: Awaitable[object], give_up: Callable[[str], Awaitable[None]] = _nothing
) -> None:
    """Run a job's work within its time; whatever goes wrong becomes a `Retry`.

    What is no fault of the job (`Unavailable`, the time) is tried for ever. Of other errors one job may have
    `UNEXPECTED_TRIES`; then `give_up` is told the reason, and the job ends.
    """
    metrics = _service(ctx).metrics
    tries = int(ctx.get("job_try") or 1)
    failures: Counter[str] = ctx["failures"]
    job_id = str(ctx.get("job_id"))
    try:
        try:
            async with asyncio.timeout(_pace(ctx).work_s):
                await work
        except (Retry, Unavailable, TimeoutError):
            raise
        except Exception as error:
            failures[job_id] += 1
            log.exception("job_failed", job=name, tries=tries)
            if failures[job_id] < UNEXPECTED_TRIES:
                metrics.jobs.labels(name, "failed").inc()
                raise Retry(defer=back_off(tries)) from error
            await give_up(f"the job failed {UNEXPECTED_TRIES} times: {error!r}")
            metrics.jobs.labels(name, "given up").inc()
        else:
            metrics.jobs.labels(name, "done").inc()
        failures.pop(job_id, None)
    except (Unavailable, TimeoutError) as error:
        metrics.jobs.labels(name, "retried").inc()
        log.warning("job_retried", job=name, tries=tries, error=str(error) or type(error).__name__)
        raise Retry(defer=back_off(tries)) from error


async def tip_events(ctx: Context, events: object) -> None:
    """The queue's door: a list of the same payloads that `POST /events` takes."""

    async def bury(reason: str) -> None:
        await _service(ctx).queue_door.bury(events, reason)

    await _carried_out(ctx, queue.TIP_EVENTS, _take_in(ctx, events), bury)


async def _take_in(ctx: Context, events: object) -> None:
    service = _service(ctx)
    seqs = await service.queue_door.take_in(events)
    enqueued_at = ctx.get("enqueue_time")
    if isinstance(enqueued_at, datetime) and enqueued_at.timestamp() > 0:
        lag_s = (datetime.now(UTC) - enqueued_at).total_seconds()
        service.metrics.queue_door_lag.observe(max(0.0, lag_s))
    cast(Handover, ctx["handover"]).add(seqs)  # stored and invalidated: the job is done


async def consume_events(ctx: Context, seqs: list[int]) -> None:
    """Events that an API process stored and invalidated."""
    await _carried_out(ctx, queue.CONSUME, _service(ctx).consumer.consume(seqs))


async def run_rebuild(ctx: Context, run_id: str) -> None:
    """A piece of a rebuild; the job comes back at once while there is more."""

    async def fail(reason: str) -> None:
        service = _service(ctx)
        await service.book.finish(run_id, "failed", service.clock.now_ms(), reason)

    await _carried_out(ctx, queue.REBUILD, _rebuild(ctx, run_id), fail)


async def _rebuild(ctx: Context, run_id: str) -> None:
    if not await _service(ctx).runner.run(run_id, _pace(ctx).budget_s):
        _continue(ctx, queue.REBUILD)


async def bury_job(ctx: Context, payload: object, reason: str) -> None:
    """A job that is no job of ours: kept for an admin."""
    await _carried_out(ctx, queue.BURY, _service(ctx).queue_door.bury(payload, reason))


async def prune(ctx: Context) -> None:
    """Nightly: events older than the retention go, piece by piece."""
    await _carried_out(ctx, queue.PRUNE, _prune(ctx))


async def _prune(ctx: Context) -> None:
    service = _service(ctx)
    days = service.settings.retention_days
    if not await retention.prune(service.log, service.clock, days, asyncio.sleep, _pace(ctx).budget_s):
        _continue(ctx, queue.PRUNE)


def _continue(ctx: Context, name: str) -> None:
    _service(ctx).metrics.jobs.labels(name, "continued").inc()
    raise Retry(defer=0)


async def sweep(service: Service, pace: Pace) -> None:
    """Take up whatever stayed unconsumed, and rebuild runs that nobody carries on. Raises `Unavailable`."""
    await service.consumer.sweep()
    for run_id in await service.book.untouched(service.clock.now_ms() - pace.untouched_ms):
        if service.queue is not None:
            await service.queue.start_rebuild(run_id)


async def _keep_sweeping(service: Service, pace: Pace) -> None:
    while True:
        try:
            await sweep(service, pace)
        except Unavailable as error:
            log.warning("sweep_failed", error=str(error))
        except Exception:
            log.exception("sweep_failed")
        await asyncio.sleep(SWEEP_EVERY_S)


class WorkerSettings:
    """What arq needs of us; `work` adds the connection, the service and the pace."""

    functions = tuple(
        func(cast(Any, job), name=name, max_tries=FOR_EVER)
        for name, job in (
            (queue.TIP_EVENTS, tip_events),
            (queue.CONSUME, consume_events),
            (queue.REBUILD, run_rebuild),
            (queue.BURY, bury_job),
        )
    )

    @staticmethod
    def crons(pace: Pace) -> list[CronJob]:
        """The nightly pruning, before the day begins in Europe."""
        return [cron(prune, name=queue.PRUNE, hour=3, minute=17, timeout=pace.job_timeout_s, max_tries=FOR_EVER)]


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
        sweeping = asyncio.create_task(_keep_sweeping(service, pace))
        ctx = context(service, pace)
        try:
            log.info("worker_started", database=str(settings.database))
            on_ready(service)
            await keep_working(
                settings.queue_url,
                stop,
                functions=WorkerSettings.functions,
                crons=WorkerSettings.crons(pace),
                pace=pace,
                context=ctx,
            )
        finally:
            await ctx["handover"].close(STOP_GRACE_S)
            await end([sweeping])
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
