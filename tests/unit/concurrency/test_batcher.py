"""Batcher: what waits together is done together, in order, and too much is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded
from tests.support.clock import FakeClock
from tests.support.waiting import eventually

BOUNDS = Bounds(kind="probes", at_once=3, patience_s=1.0, most=6)


class Work:
    """Doubles numbers, one group after the other, when it is let."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.clock = FakeClock()
        self.open = asyncio.Event()
        self.failure: Exception | None = None
        self.rounds: Batcher[int, int] = Batcher(self.double, self.clock.monotonic, BOUNDS)

    async def double(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        await self.open.wait()
        self.clock.advance(1_000)
        if self.failure is not None:
            raise self.failure
        return [2 * item for item in items]


@pytest.fixture
async def work() -> Work:
    """Work that waits to be let."""
    return Work()


async def test_what_waits_is_done_in_groups_in_the_order_it_came(work: Work) -> None:
    done = [work.rounds.submit(number) for number in range(6)]
    work.open.set()
    assert await asyncio.gather(*done) == [0, 2, 4, 6, 8, 10]
    assert work.groups == [[0, 1, 2], [3, 4, 5]]


async def test_one_more_than_may_wait_is_refused(work: Work) -> None:
    first = work.rounds.submit(0)
    await eventually(lambda: work.groups)
    waiting = [work.rounds.submit(number) for number in range(1, 7)]
    assert work.rounds.overloaded
    with pytest.raises(Overloaded) as caught:
        work.rounds.submit(7)
    assert caught.value.kind == "probes"
    work.open.set()
    assert await asyncio.gather(first, *waiting) == [0, 2, 4, 6, 8, 10, 12]
    assert not work.rounds.overloaded


async def test_who_would_wait_too_long_is_refused(work: Work) -> None:
    work.open.set()
    await work.rounds.submit(0)  # it took a second
    work.open.clear()
    waiting = [work.rounds.submit(0)]
    await eventually(lambda: len(work.groups) == 2)
    while not work.rounds.overloaded:
        waiting.append(work.rounds.submit(0))
    assert len(waiting) == 1 + BOUNDS.at_once + 1, "not by what it took"
    work.open.set()
    await asyncio.gather(*waiting)


async def test_all_of_a_group_are_told_when_it_fails_and_the_next_goes_on(work: Work) -> None:
    work.failure = ValueError("no")
    failed = [work.rounds.submit(number) for number in range(3)]
    work.open.set()
    assert [type(found) for found in await asyncio.gather(*failed, return_exceptions=True)] == [ValueError] * 3
    work.failure = None
    assert await work.rounds.submit(4) == 8


async def test_others_are_answered_when_one_stops_waiting(work: Work) -> None:
    gone, stays = work.rounds.submit(1), work.rounds.submit(2)
    await eventually(lambda: work.groups)
    gone.cancel()
    work.open.set()
    assert await stays == 4
    assert work.groups == [[1, 2]]


async def test_closing_finishes_what_was_begun(work: Work) -> None:
    done = [work.rounds.submit(number) for number in range(5)]
    work.open.set()
    await work.rounds.close()
    assert all(item.done() for item in done)


async def test_closing_ends_when_the_work_was_cancelled_before_it_began(work: Work) -> None:
    before = asyncio.all_tasks()
    waiting = work.rounds.submit(1)
    (working,) = asyncio.all_tasks() - before
    working.cancel()
    async with asyncio.timeout(5):
        await work.rounds.close()
    waiting.cancel()
