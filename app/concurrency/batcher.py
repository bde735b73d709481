"""Collects items that are submitted while a call is running, and passes them together to the next call.

A commit, a job or a hop to the database's thread costs about the same for one item as for many.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Generic, NamedTuple, TypeVar

from app.concurrency.overload import LoadEstimate
from app.concurrency.tasks import end, fail
from app.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bounds(NamedTuple):
    """Limits of a batcher. `at_once` and `most` are sums of item sizes; by default each item has the size 1.

    `kind`: the name of the load in the error `Overloaded`.
    `at_once`: the largest sum of item sizes in one call of `work`. A larger item gets a call of its own.
    `most`: the largest sum of the sizes of waiting items; an item that would exceed `most` is rejected.
    `patience_s`: while more than `at_once` waits, an item is rejected if its estimated wait exceeds this many seconds.
    `apart_s`: a call with less than `at_once` starts at least this many seconds after the start of the previous call.
    """

    kind: str
    at_once: int
    most: int
    patience_s: float = float("inf")
    apart_s: float = 0.0


class _Entry(NamedTuple, Generic[Item, Result]):
    item: Item
    size: int
    done: asyncio.Future[Result]
    context: Context


class Batcher(Generic[Item, Result]):
    """Collects submitted items and passes them to `work` in groups.

    `work` returns one result per item, in the same order. Guarantees:

      1. Order: items are worked on in the order of their submission, each exactly once, one group at a time.
      2. Freshness: each call of `work` begins after every item of its group was submitted.
      3. Latency: an idle batcher calls `work` in the next turn of the event loop, unless `apart_s` defers it.
      4. Isolation: if `work` raises, every future of that group raises the same exception, and no other future does.
      5. Cancellation: cancelling the future of an item stops neither the work on that item nor on any other item.
      6. Bounded memory: the sum of the sizes of all waiting items is at most `most`.
      7. After `close`, every future is done.
      8. Context: `work` runs with the context variables of the group's first item.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        monotonic: Callable[[], float],
        bounds: Bounds,
        *,
        size: Callable[[Item], int] = lambda _: 1,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._work = work
        self._bounds = bounds
        self._size = size
        self._monotonic = monotonic
        self._pause = pause
        self._load = LoadEstimate(lanes=1, patience_s=bounds.patience_s, always=bounds.at_once)
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._working: asyncio.Task[None] | None = None
        self._next_at = float("-inf")
        # Cached: `get_running_loop()` makes a system call on Python 3.11.
        self._loop = asyncio.get_running_loop()

    @property
    def overloaded(self) -> bool:
        """Whether an item of size 1 would be rejected now."""
        return self._load.full or self._load.waiting >= self._bounds.most

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Add an item to the next group; the future gives its result. Raises `Overloaded` if too many items wait."""
        size = self._size(item)
        if self._load.full or self._load.waiting + size > self._bounds.most:
            raise Overloaded(self._bounds.kind)
        done: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append(_Entry(item, size, done, copy_context()))
        self._load.waiting += size
        if self._working is None or self._working.done():
            self._begin()
        return done

    async def close(self, grace_s: float | None = None) -> None:
        """Wait until every submitted item is done. If that takes longer than `grace_s` seconds, cancel the running call
        and the items that wait."""
        until = None if grace_s is None else self._loop.time() + grace_s
        while (working := self._working) is not None and not working.done():
            await asyncio.wait({working}, timeout=until and max(0.0, until - self._loop.time()))
            if not working.done():
                await end([working])
        while self._waiting:  # the task was cancelled
            self._waiting.popleft().done.cancel()
        self._load.waiting = 0

    def _begin(self) -> None:
        self._working = self._loop.create_task(self._work_off(), context=self._waiting[0].context)

    async def _work_off(self) -> None:
        early_s = self._next_at - self._monotonic()
        if early_s > 0 and self._load.waiting < self._bounds.at_once:
            await self._pause(early_s)
        group = [self._waiting.popleft()]
        taken = group[0].size
        while self._waiting and taken + self._waiting[0].size <= self._bounds.at_once:
            group.append(self._waiting.popleft())
            taken += group[-1].size
        self._load.waiting -= taken
        await self._work_on(group, taken)
        if self._waiting:
            self._begin()

    async def _work_on(self, group: Sequence[_Entry[Item, Result]], size: int) -> None:
        started = self._monotonic()
        self._next_at = started + self._bounds.apart_s
        try:
            results = await self._work([entry.item for entry in group])
            if len(results) != len(group):
                raise RuntimeError(f"{len(results)} results for {len(group)} items")
        except BaseException as error:
            for entry in group:
                fail(entry.done, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._load.worked(size, self._monotonic() - started)
            for entry, result in zip(group, results, strict=True):
                if not entry.done.done():
                    entry.done.set_result(result)


class Handover(Batcher[Sequence[Item], None]):
    """Collects lists of items and passes them to `work` in the background, `bounds.at_once` items at a time or fewer.
    Items beyond `bounds.most` are dropped."""

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[None]],
        bounds: Bounds,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        async def work_on(parts: Sequence[Sequence[Item]]) -> list[None]:
            await work([item for part in parts for item in part])
            return [None] * len(parts)

        super().__init__(work_on, time.monotonic, bounds, size=len, pause=pause)

    def add(self, items: Sequence[Item]) -> None:
        with suppress(Overloaded):
            for start in range(0, len(items), self._bounds.at_once):
                self.submit(items[start : start + self._bounds.at_once])
