"""The overload queue admits a few requests at a time, in order, with rests between, and none waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.concurrency.overload_queue import AT_ONCE, LOOP_TURNS, REST_MOST_S, RESTS, OverloadQueue
from tests.support.waiting import eventually

MOST_S = 1.0
LOOP_TURN_S = 0.002


class Hall:
    """An overload queue in which each turn of the loop takes a while, and rests last until a test ends them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.loop_turn_s = LOOP_TURN_S
        self.rests: list[float] = []
        self.rested = asyncio.Event()
        self.turns = OverloadQueue(MOST_S, lambda: self.now, self._pause)
        self.given: list[tuple[int, bool]] = []
        self.waiting: list[asyncio.Task[None]] = []

    async def _pause(self, seconds: float) -> None:
        if not seconds:
            self.now += self.loop_turn_s
            await asyncio.sleep(0)
            return
        self.rests.append(seconds)
        await self.rested.wait()
        self.rested.clear()
        self.now += seconds

    async def come(self, count: int) -> None:
        """So many more line up."""
        for _ in range(count):
            self.waiting.append(asyncio.create_task(self._wait(len(self.waiting))))
        await asyncio.sleep(0)

    async def _wait(self, name: int) -> None:
        self.given.append((name, await self.turns.wait()))

    async def resting(self, times: int) -> None:
        """Return when the hall rests for that time."""
        await eventually(lambda: len(self.rests) == times)


@pytest.fixture
async def hall() -> AsyncIterator[Hall]:
    opened = Hall()
    yield opened
    await opened.turns.close()
    await asyncio.gather(*opened.waiting, return_exceptions=True)


async def test_some_are_taken_in_order_and_a_rest_follows_when_many_wait(hall: Hall) -> None:
    await hall.come(2 * AT_ONCE + 1)
    await hall.resting(1)
    assert hall.given == [(name, True) for name in range(AT_ONCE)]
    assert hall.rests == [pytest.approx(RESTS * LOOP_TURNS * LOOP_TURN_S)]
    hall.rested.set()
    await hall.resting(2)
    assert len(hall.given) == 2 * AT_ONCE
    hall.rested.set()
    await asyncio.gather(*hall.waiting)
    assert hall.given == [(name, True) for name in range(2 * AT_ONCE + 1)]
    assert len(hall.rests) == 2, "nobody waits: no rest"


async def test_nobody_waits_for_a_rest_when_they_come_one_by_one(hall: Hall) -> None:
    for name in range(3):
        await hall.come(1)
        await asyncio.gather(*hall.waiting)
        assert hall.given[-1] == (name, True)
        await eventually(lambda: hall.turns.idle)
    assert hall.rests == []


async def test_a_rest_is_bounded_when_the_loop_is_very_late(hall: Hall) -> None:
    hall.loop_turn_s = REST_MOST_S
    await hall.come(AT_ONCE + 1)
    await hall.resting(1)
    assert hall.rests == [REST_MOST_S]


async def test_who_waited_too_long_is_told_so_and_takes_nobody_s_place(hall: Hall) -> None:
    await hall.come(3 * AT_ONCE)
    await hall.resting(1)
    hall.now += MOST_S
    await hall.come(1)
    hall.rested.set()
    await asyncio.gather(*hall.waiting)
    assert hall.given[AT_ONCE:] == [*((name, False) for name in range(AT_ONCE, 3 * AT_ONCE)), (3 * AT_ONCE, True)]


async def test_the_others_are_taken_when_one_went_away(hall: Hall) -> None:
    await hall.come(AT_ONCE + 2)
    hall.waiting[0].cancel()
    await hall.resting(1)
    hall.waiting[AT_ONCE].cancel()
    hall.rested.set()
    await asyncio.gather(*hall.waiting, return_exceptions=True)
    assert [name for name, _ in hall.given] == [*range(1, AT_ONCE), AT_ONCE + 1]


async def test_whoever_waits_is_given_its_turn_when_it_closes(hall: Hall) -> None:
    await hall.come(AT_ONCE + 5)
    await hall.resting(1)
    await hall.turns.close()
    await asyncio.gather(*hall.waiting)
    assert hall.given == [(name, True) for name in range(AT_ONCE + 5)]
