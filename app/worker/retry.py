"""Runs the work of a job within its time limit and turns errors into `Retry`.

arq drops a job that raises anything but `Retry`, and a job that was tried `max_tries` times. An event must survive
both, so jobs raise only `Retry` and have no limit of tries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

from arq.worker import Retry

from app.bootstrap.service import OpenService
from app.errors import Unavailable
from app.events.handover import Handover
from app.stores.queue.worker import Pace
from app.telemetry import logger, warn

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
UNEXPECTED_TRIES = 5
log = logger("worker")

Context = dict[str, Any]


def service_of(ctx: Context) -> OpenService:
    return cast(OpenService, ctx["service"])


def pace_of(ctx: Context) -> Pace:
    return cast(Pace, ctx["pace"])


def context(service: OpenService, pace: Pace) -> Context:
    """The context that arq passes to every job. `failures` counts unexpected errors by job id."""
    handover = Handover(service.consumer, pace.work_s)
    return {"service": service, "pace": pace, "handover": handover, "failures": Counter()}


def back_off(tries: int) -> float:
    """The delay in seconds before try `tries` + 1: it doubles up to `RETRY_MOST_S`."""
    return float(min(RETRY_MOST_S, RETRY_FIRST_S * 2 ** min(tries - 1, 10)))


async def nothing(_: str) -> None:
    """For jobs whose work the sweep or the next night repeats."""


async def carried_out(
    ctx: Context, name: str, work: Awaitable[object], give_up: Callable[[str], Awaitable[None]] = nothing
) -> None:
    """Run a job's work within its time limit.

    `Unavailable` and a timeout are retried without limit. After `UNEXPECTED_TRIES` other errors of the same job,
    `give_up` is called with the reason and the job ends.

    Raises:
        Retry: the work failed and is tried again.
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
    """End this try of a job and start the next one at once. Raises `Retry`."""
    service_of(ctx).metrics.jobs.labels(name, "continued").inc()
    raise Retry(defer=0)
