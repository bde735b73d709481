"""The guarantees of the batcher, on random schedules of submissions, cancellations, failures and time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.concurrency.batcher import Batcher, Bounds
from app.errors import Overloaded

AT_ONCE, MOST, APART_S = 4, 9, 1.0
BOUNDS = Bounds(kind="probes", at_once=AT_ONCE, most=MOST, apart_s=APART_S)


class Item(NamedTuple):
    number: int
    size: int


@dataclass
class Call:
    """A call of the work: its items and time, how many items had been submitted, and the size of those that waited."""

    items: list[Item]
    at: float
    submitted: int
    waiting: int
    succeeded: bool = False


class WorkFailed(Exception):
    """The argument is the number of the call."""


class Driver:
    """Runs a batcher step by step: its clock, its pauses and the end of each call are controlled by the test."""

    def __init__(self, bounds: Bounds = BOUNDS) -> None:
        self.now = 0.0
        self.calls: list[Call] = []
        self.futures: dict[Item, asyncio.Future[int]] = {}
        self.running: asyncio.Future[bool] | None = None
        self.pausing: tuple[float, asyncio.Future[None]] | None = None
        self.batcher: Batcher[Item, int] = Batcher(
            self._work, lambda: self.now, bounds, size=lambda item: item.size, pause=self._pause
        )

    async def _work(self, items: Sequence[Item]) -> list[int]:
        assert self.running is None, "one group at a time"
        call = Call(list(items), self.now, len(self.futures), self.waiting)
        self.calls.append(call)
        self.running = asyncio.get_running_loop().create_future()
        try:
            call.succeeded = await self.running
        finally:
            self.running = None
        if call.succeeded:
            return [item.number for item in items]
        raise WorkFailed(len(self.calls) - 1)

    async def _pause(self, seconds: float) -> None:
        assert self.waiting < AT_ONCE, "a full group does not wait"
        over = asyncio.get_running_loop().create_future()
        self.pausing = (self.now + seconds, over)
        try:
            await over
        finally:
            self.pausing = None

    @property
    def waiting(self) -> int:
        """The size of the items that no call has taken."""
        taken = sum(len(call.items) for call in self.calls)
        return sum(item.size for item in list(self.futures)[taken:])

    def submit(self, size: int) -> None:
        item = Item(len(self.futures), size)
        fits = self.waiting + size <= MOST
        try:
            future = self.batcher.submit(item)
        except Overloaded:
            assert not fits
        else:
            assert fits
            self.futures[item] = future

    def cancel(self, place: int) -> None:
        if self.futures:
            list(self.futures.values())[place % len(self.futures)].cancel()

    def finish(self, good: bool) -> None:
        if self.running is not None and not self.running.done():
            self.running.set_result(good)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        if self.pausing is not None and self.pausing[0] <= self.now and not self.pausing[1].done():
            self.pausing[1].set_result(None)

    async def finish_all(self) -> None:
        """Close while every call succeeds and every pause ends."""
        closing = asyncio.ensure_future(self.batcher.close())
        while not closing.done():
            self.finish(True)
            if self.pausing is not None:
                self.advance(APART_S / 4)
            await asyncio.sleep(0)
        await closing


# What happens, with which argument, and how many turns of the loop follow.
Step = tuple[str, int | float | bool, int]
TURNS = st.sampled_from([0, 3])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 6), TURNS),
        st.tuples(st.just("submit"), st.just(1), TURNS),
        st.tuples(st.just("finish"), st.booleans(), TURNS),
        st.tuples(st.just("advance"), st.sampled_from([0.25, 0.5, 1.0]), TURNS),
        st.tuples(st.just("cancel"), st.integers(0, 30), TURNS),
    ),
    max_size=40,
)


async def played(steps: Sequence[Step]) -> Driver:
    driver = Driver()
    for name, argument, turns in steps:
        getattr(driver, name)(argument)
        for _ in range(turns):
            await asyncio.sleep(0)
    await driver.finish_all()
    return driver


@settings(max_examples=3 * settings().max_examples)
@given(STEPS)
def test_batcher_keeps_its_guarantees_on_any_schedule(steps: list[Step]) -> None:
    driver = asyncio.run(played(steps))
    assert [item for call in driver.calls for item in call.items] == list(driver.futures), "once each, in order"
    following = 0
    for call in driver.calls:
        assert call.items[-1].number < call.submitted, "submitted before the call"
        size = sum(item.size for item in call.items)
        assert size <= AT_ONCE or len(call.items) == 1
        following += len(call.items)
        assert following == call.submitted or size + list(driver.futures)[following].size > AT_ONCE
    for earlier, call in pairwise(driver.calls):
        assert call.at - earlier.at >= APART_S or call.waiting >= AT_ONCE
    for number, call in enumerate(driver.calls):
        for item in call.items:
            future = driver.futures[item]
            assert future.done()
            if not future.cancelled():
                error = future.exception()
                assert (error is None) == call.succeeded, "the error of its own group, or none"
                assert future.result() == item.number if error is None else error.args == (number,)


async def test_idle_batcher_starts_in_the_next_turn_of_the_loop() -> None:
    driver = Driver()
    driver.submit(1)
    assert driver.calls == []
    await asyncio.sleep(0)
    assert [call.items for call in driver.calls] == [[Item(0, 1)]]
    await driver.finish_all()


async def test_every_future_is_done_when_closing_takes_too_long() -> None:
    driver = Driver()
    driver.submit(1)
    await asyncio.sleep(0)
    driver.submit(1)
    await driver.batcher.close(0.01)
    assert [future.cancelled() for future in driver.futures.values()] == [True, True]
    assert driver.running is None


async def test_work_goes_on_when_it_was_cancelled_and_another_item_comes() -> None:
    driver = Driver()
    before = asyncio.all_tasks()
    driver.submit(1)
    (working,) = asyncio.all_tasks() - before
    working.cancel()
    await asyncio.wait({working})
    driver.submit(1)
    await driver.finish_all()
    assert [future.result() for future in driver.futures.values()] == [0, 1]


async def test_group_fails_when_the_number_of_results_is_wrong() -> None:
    async def work(items: Sequence[int]) -> list[int]:
        return list(items)[1:] if len(items) > 1 else list(items)

    batcher: Batcher[int, int] = Batcher(work, lambda: 0.0, BOUNDS._replace(apart_s=0.0))
    first, second = batcher.submit(1), batcher.submit(2)
    for future in (first, second):
        with pytest.raises(RuntimeError):
            await future
    assert await batcher.submit(3) == 3
