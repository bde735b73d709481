"""A task ends, even one that swallows its cancellation."""

from __future__ import annotations

import asyncio

from app.concurrency.tasks import end


async def test_task_ends_when_it_swallows_a_cancellation() -> None:
    swallowed = 0
    started = asyncio.Event()

    async def stubborn() -> None:
        nonlocal swallowed
        started.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 1:
                    raise

    task = asyncio.create_task(stubborn())
    await started.wait()
    await end([task])
    assert task.cancelled()
    assert swallowed == 2


async def test_nothing_is_raised_when_a_task_has_failed() -> None:
    async def failing() -> None:
        raise RuntimeError("of no interest")

    task = asyncio.create_task(failing())
    await end([task])
    assert task.done()
