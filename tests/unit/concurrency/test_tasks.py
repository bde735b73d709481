"""A task ends, even one that swallows its cancellation; and which signals stop a process."""

from __future__ import annotations

import asyncio
import signal

import pytest

from app.concurrency.tasks import end, stop_signals


@pytest.mark.slow
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


def test_hangup_stops_a_process_unless_it_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert set(stop_signals()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert set(stop_signals()) == {signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGHUP, before)
