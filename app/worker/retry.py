"""A decorator for arq jobs: it limits the time of each try and turns every error into a `Retry`.

arq drops a job that raises anything but `Retry`, and a job that was tried `max_tries` times. No event may be lost in
this way, so jobs raise only `Retry` and have no limit of tries.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from functools import partial, wraps
from typing import Any, NotRequired, TypedDict

from arq.worker import Retry

from app.bootstrap.service import OpenService
from app.concurrency.batcher import Handover
from app.errors import Unavailable
from app.events.consume import BOUNDS
from app.stores.queue.worker import Pace
from app.telemetry import logger, warn

RETRY_FIRST_S = 0.2
RETRY_MOST_S = 5.0
UNEXPECTED_TRIES = 5
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
