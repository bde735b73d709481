"""Batcher: items that wait are processed in groups, in order; too many are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded
from tests.support.clock import FakeClock
from tests.support.waiting import PATIENCE_S, eventually

BOUNDS = Bounds(kind="probes", at_once=3, patience_s=1.0, most=6)


class Work:
    """Doubles numbers, one group after the other, while `open` is set."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.clock = FakeClock()
        self.open = asyncio.Event()
        self.failure: Exception | None = None
        self.batcher: Batcher[int, int] = Batcher(self.double, self.clock.monotonic, BOUNDS)

    async def double(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        await self.open.wait()
        self.clock.advance(1_000)
        if self.failure is not None:
            raise self.failure
        return [2 * item for item in items]


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_items_are_processed_in_groups_in_order(work: Work) -> None:
    done = [work.batcher.submit(number) for number in range(6)]
    work.open.set()
    assert await asyncio.gather(*done) == [0, 2, 4, 6, 8, 10]
    assert work.groups == [[0, 1, 2], [3, 4, 5]]


async def test_group_runs_in_the_context_of_its_first_item() -> None:
    request, seen = ContextVar("request", default=""), list[str]()

    async def work(items: Sequence[str]) -> Sequence[str]:
        seen.append(request.get())
        return items

    batcher = Batcher(work, FakeClock().monotonic, BOUNDS._replace(at_once=2))
    for name in ("a", "b", "c", "d", "e"):
        request.set(name)
        batcher.submit(name)
    await batcher.close()
    assert seen == ["a", "c", "e"]


async def test_item_is_refused_when_too_many_wait(work: Work) -> None:
    first = work.batcher.submit(0)
    await eventually(lambda: work.groups)
    waiting = [work.batcher.submit(number) for number in range(1, 7)]
    assert work.batcher.overloaded
    with pytest.raises(Overloaded) as caught:
        work.batcher.submit(7)
    assert caught.value.kind == "probes"
    work.open.set()
    assert await asyncio.gather(first, *waiting) == [0, 2, 4, 6, 8, 10, 12]
    assert not work.batcher.overloaded


async def test_item_is_refused_when_it_would_wait_too_long(work: Work) -> None:
    work.open.set()
    await work.batcher.submit(0)  # takes one second of the fake clock
    work.open.clear()
    waiting = [work.batcher.submit(0)]
    await eventually(lambda: len(work.groups) == 2)
    while not work.batcher.overloaded:
        waiting.append(work.batcher.submit(0))
    assert len(waiting) == 1 + BOUNDS.at_once + 1, "not by the duration of the last group"
    work.open.set()
    await asyncio.gather(*waiting)


async def test_failure_concerns_one_group_only(work: Work) -> None:
    work.failure = ValueError("no")
    failed = [work.batcher.submit(number) for number in range(3)]
    work.open.set()
    assert [type(found) for found in await asyncio.gather(*failed, return_exceptions=True)] == [ValueError] * 3
    work.failure = None
    assert await work.batcher.submit(4) == 8


async def test_other_items_are_processed_when_one_is_cancelled(work: Work) -> None:
    gone, stays = work.batcher.submit(1), work.batcher.submit(2)
    await eventually(lambda: work.groups)
    gone.cancel()
    work.open.set()
    assert await stays == 4
    assert work.groups == [[1, 2]]


async def test_closing_processes_the_waiting_items(work: Work) -> None:
    done = [work.batcher.submit(number) for number in range(5)]
    work.open.set()
    await work.batcher.close()
    assert all(item.done() for item in done)


async def test_closing_returns_when_the_task_was_cancelled_before_it_began(work: Work) -> None:
    before = asyncio.all_tasks()
    waiting = work.batcher.submit(1)
    (working,) = asyncio.all_tasks() - before
    working.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await work.batcher.close()
    waiting.cancel()
