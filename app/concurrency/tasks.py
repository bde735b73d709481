"""Helpers: run tasks until a block ends, repeat work, cancel tasks, make a future fail; and the stop signals."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from app.errors import Unavailable
from app.telemetry import logger, warn

CANCEL_AGAIN_S = 0.5
log = logger("periodic")


def stop_signals() -> list[signal.Signals]:
    """The signals that stop this process: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under `nohup`."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines in the background until the block ends, then cancel them."""
    tasks = [asyncio.get_running_loop().create_task(each) for each in work]
    try:
        yield
    finally:
        await end(tasks)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until all have ended; their exceptions are ignored. The cancellation is repeated every
    `CANCEL_AGAIN_S` seconds, since a library may swallow it, as redis-py does while connecting."""
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


def fail(done: asyncio.Future[Any], error: BaseException) -> None:
    """Set an error on a future. If the error is not an `Exception` (such as `CancelledError`), cancel the future
    instead. Do nothing if the future is done, for example because its caller has cancelled it."""
    if done.done():
        return
    if isinstance(error, Exception):
        done.set_exception(error)
        done.exception()  # retrieved: asyncio logs an exception that no caller retrieves, and the caller may be gone
    else:
        done.cancel()


async def repeat(
    name: str,
    work: Callable[[], Awaitable[object]],
    every_s: float,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Run `work`, then pause for `every_s` seconds, until cancelled.

    An exception is logged under `name`, and the next run takes place as usual. If runs raise `Unavailable` one after
    another, the first is logged as a warning and the others at the level debug. Any other exception is logged with its
    traceback.
    """
    unavailable = False
    while True:
        try:
            await work()
            unavailable = False
        except Unavailable as error:
            (log.debug if unavailable else warn(log, error))("run_put_off", name=name, error=str(error))
            unavailable = True
        except Exception:
            log.exception("run_failed", name=name)
        await pause(every_s)
