"""Waiting for a condition instead of a fixed time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from time import monotonic

_STEP_S = 0.002
# Only failing tests wait for so long. It is generous, because the machine may be overloaded.
PATIENCE_S = 60.0


async def eventually(predicate: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as `predicate` is true. Raises `AssertionError` after `timeout_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not predicate():
        if loop.time() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {predicate}")
        step: asyncio.Future[None] = loop.create_future()
        loop.call_later(_STEP_S, step.set_result, None)
        await step


def eventually_sync(predicate: Callable[[], object], timeout_s: float = PATIENCE_S, step_s: float = 0.02) -> None:
    """The same without an event loop."""
    deadline = monotonic() + timeout_s
    never = threading.Event()
    while not predicate():
        if monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {predicate}")
        never.wait(step_s)


async def eventually_async(
    ask: Callable[[], Awaitable[object]], timeout_s: float = PATIENCE_S, step_s: float = 0.02
) -> None:
    """The same for a condition that is awaited."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not await ask():
        if loop.time() > deadline:
            raise AssertionError(f"not true within {timeout_s} s: {ask}")
        step: asyncio.Future[None] = loop.create_future()
        loop.call_later(step_s, step.set_result, None)
        await step
