"""Runs and cancels background tasks, and fails futures, reliably."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

CANCEL_AGAIN_S = 0.5


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines in the background until the block ends, then cancel them."""
    tasks = [asyncio.get_running_loop().create_task(each) for each in work]
    try:
        yield
    finally:
        await end(tasks)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel until all have ended, since a library may swallow a cancellation, as redis-py does while connecting.

    Exceptions of the tasks are ignored.
    """
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


def fail(done: asyncio.Future[Any], error: BaseException) -> None:
    """Raise an error to the caller that waits for `done`, or cancel `done` if the error is a cancellation.

    Nothing happens if the caller has cancelled `done` itself.
    """
    if done.done():
        return
    if isinstance(error, Exception):
        done.set_exception(error)
        done.exception()  # retrieved: asyncio logs an exception that no caller retrieves, and the caller may be gone
    else:
        done.cancel()
