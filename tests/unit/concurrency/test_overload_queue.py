"""The overload queue releases a few requests at a time, in order, with pauses between, and bounds each wait."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.concurrency.overload import AT_ONCE, LOOP_TURNS, PAUSE_FACTOR, PAUSE_MOST_S, OverloadQueue
from tests.support.waiting import eventually

MOST_S = 1.0
LOOP_TURN_S = 0.002


class QueueFixture:
    """An overload queue in which a turn of the loop takes `loop_turn_s`, and a pause lasts until the test ends it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.loop_turn_s = LOOP_TURN_S
        self.pauses: list[float] = []
        self.pause_over = asyncio.Event()
        self.queue = OverloadQueue(MOST_S, lambda: self.now, self._pause)
        self.released: list[tuple[int, bool]] = []
        self.waiting: list[asyncio.Task[None]] = []

    async def _pause(self, seconds: float) -> None:
        if not seconds:
            self.now += self.loop_turn_s
            await asyncio.sleep(0)
            return
        self.pauses.append(seconds)
        await self.pause_over.wait()
        self.pause_over.clear()
        self.now += seconds

    async def add(self, count: int) -> None:
        for _ in range(count):
            self.waiting.append(asyncio.create_task(self._wait(len(self.waiting))))
        await asyncio.sleep(0)

    async def _wait(self, number: int) -> None:
        self.released.append((number, await self.queue.wait()))

    async def pausing(self, times: int) -> None:
        """Return when the queue pauses for that time."""
        await eventually(lambda: len(self.pauses) == times)


@pytest.fixture
async def opened() -> AsyncIterator[QueueFixture]:
    fixture = QueueFixture()
    yield fixture
    await fixture.queue.close()
    await asyncio.gather(*fixture.waiting, return_exceptions=True)


async def test_groups_are_released_in_order_with_pauses_when_many_wait(opened: QueueFixture) -> None:
    await opened.add(2 * AT_ONCE + 1)
    await opened.pausing(1)
    assert opened.released == [(number, True) for number in range(AT_ONCE)]
    assert opened.pauses == [pytest.approx(PAUSE_FACTOR * LOOP_TURNS * LOOP_TURN_S)]
    opened.pause_over.set()
    await opened.pausing(2)
    assert len(opened.released) == 2 * AT_ONCE
    opened.pause_over.set()
    await asyncio.gather(*opened.waiting)
    assert opened.released == [(number, True) for number in range(2 * AT_ONCE + 1)]
    assert len(opened.pauses) == 2, "no pause when no request waits"


async def test_no_pause_when_requests_come_one_by_one(opened: QueueFixture) -> None:
    for number in range(3):
        await opened.add(1)
        await asyncio.gather(*opened.waiting)
        assert opened.released[-1] == (number, True)
        for _ in range(2 * LOOP_TURNS):
            await asyncio.sleep(0)
    assert opened.pauses == []


async def test_pause_is_bounded_when_the_loop_is_very_late(opened: QueueFixture) -> None:
    opened.loop_turn_s = PAUSE_MOST_S
    await opened.add(AT_ONCE + 1)
    await opened.pausing(1)
    assert opened.pauses == [PAUSE_MOST_S]


async def test_requests_that_waited_too_long_are_shed_and_take_no_place(opened: QueueFixture) -> None:
    await opened.add(3 * AT_ONCE)
    await opened.pausing(1)
    opened.now += MOST_S
    await opened.add(1)
    opened.pause_over.set()
    await asyncio.gather(*opened.waiting)
    shed = [(number, False) for number in range(AT_ONCE, 3 * AT_ONCE)]
    assert opened.released[AT_ONCE:] == [*shed, (3 * AT_ONCE, True)]


async def test_other_requests_are_released_when_one_is_cancelled(opened: QueueFixture) -> None:
    await opened.add(AT_ONCE + 2)
    opened.waiting[0].cancel()
    await opened.pausing(1)
    opened.waiting[AT_ONCE].cancel()
    opened.pause_over.set()
    await asyncio.gather(*opened.waiting, return_exceptions=True)
    assert [number for number, _ in opened.released] == [*range(1, AT_ONCE), AT_ONCE + 1]


async def test_waiting_requests_are_released_when_the_queue_closes(opened: QueueFixture) -> None:
    await opened.add(AT_ONCE + 5)
    await opened.pausing(1)
    await opened.queue.close()
    await asyncio.gather(*opened.waiting)
    assert opened.released == [(number, True) for number in range(AT_ONCE + 5)]
