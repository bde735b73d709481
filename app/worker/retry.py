"""How a job is carried out: thin, bounded in time, and with `Retry` for whatever goes wrong.

arq drops a job that raises anything but `Retry`, and forgets one it has tried `max_tries` times; an event must survive
both, so jobs raise nothing but `Retry`, and may be tried for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

from arq.worker import Retry

from app.bootstrap.service import Service
from app.errors import Unavailable
from app.events.handover import Handover
from app.stores.queue.worker import Pace
from app.telemetry import logger, warn

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
UNEXPECTED_TRIES = 5
log = logger("worker")

Context = dict[str, Any]


def service_of(ctx: Context) -> Service:
    """The parts of this worker."""
    return cast(Service, ctx["service"])


def pace_of(ctx: Context) -> Pace:
    """How long its jobs may take."""
    return cast(Pace, ctx["pace"])


def context(service: Service, pace: Pace) -> Context:
    """What every job is given; `failures` counts, per job, unexpected errors."""
    handover = Handover(service.consumer, pace.work_s)
    return {"service": service, "pace": pace, "handover": handover, "failures": Counter()}


def back_off(tries: int) -> float:
    """Seconds before try `tries` + 1: doubling, up to a bound."""
    return float(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(tries - 1, 10)))


async def nothing(_: str) -> None:
    """Give up without a word: the sweep, or the next night, makes good for it."""


async def carried_out(
    ctx: Context, name: str, work: Awaitable[object], give_up: Callable[[str], Awaitable[None]] = nothing
) -> None:
    """Run a job's work within its time; whatever goes wrong becomes a `Retry`.

    What is no fault of the job (`Unavailable`, the time) is tried for ever. Of other errors one job may have
    `UNEXPECTED_TRIES`; then `give_up` is told the reason, and the job ends.
    """
    metrics = service_of(ctx).metrics
    tries = int(ctx.get("job_try") or 1)
    failures: Counter[str] = ctx["failures"]
    job_id = str(ctx.get("job_id"))
    try:
        try:
            async with asyncio.timeout(pace_of(ctx).work_s):
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
        warn(log, error)("job_retried", job=name, tries=tries, error=str(error) or type(error).__name__)
        raise Retry(defer=back_off(tries)) from error


def come_back(ctx: Context, name: str) -> None:
    """End this piece of a job and have the next one at once: raises `Retry`."""
    service_of(ctx).metrics.jobs.labels(name, "continued").inc()
    raise Retry(defer=0)
