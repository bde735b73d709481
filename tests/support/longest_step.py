"""The longest step of the event loop, for tests that promise not to block it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import thread_time

from tests.support.clock import no_pause

LIMIT_S = 0.03
RUNS = 5


class LongestStep:
    seconds = 0.0


@asynccontextmanager
async def longest_step() -> AsyncIterator[LongestStep]:
    """Measure the longest time for which one step of other tasks holds the event loop within the block. It is processor
    time of the loop's thread, so other programs do not lengthen it. The cycle collector is off meanwhile, because its
    time depends on all earlier tests."""
    step = LongestStep()

    async def watch() -> None:
        before = thread_time()
        while True:
            await no_pause(0)
            now = thread_time()
            step.seconds, before = max(step.seconds, now - before), now

    collects = gc.isenabled()
    gc.disable()
    watching = asyncio.create_task(watch())
    try:
        yield step
    finally:
        watching.cancel()
        if collects:
            gc.enable()


async def assert_no_long_step(run: Callable[[], Awaitable[float]]) -> None:
    """Assert that the longest step of a run is shorter than `LIMIT_S`; `run` returns its seconds. A busy machine may
    slow down a step of one run, but code that blocks does so in every run. So up to `RUNS` runs are made, until one is
    below the limit."""
    seconds: list[float] = []
    while len(seconds) < RUNS and min(seconds, default=LIMIT_S) >= LIMIT_S:
        seconds.append(await run())
    assert min(seconds) < LIMIT_S, seconds
