"""A batcher: items that wait at the same time are worked on together, one group after the other.

A hop to the database's thread or a durable commit costs about the same for one item as for many. Memory is bounded: an
item is rejected if it would wait too long (`app.concurrency.load_estimate`) or if too many items wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from app.concurrency.load_estimate import LoadEstimate
from app.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bounds(NamedTuple):
    """`kind` names the load in a rejection. A group has up to `at_once` items, and up to `most` items may wait."""

    kind: str
    at_once: int
    patience_s: float
    most: int


class Batcher(Generic[Item, Result]):
    """Passes groups of items to `work`, which returns one result per item or raises for the whole group."""

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        monotonic: Callable[[], float],
        bounds: Bounds,
    ) -> None:
        self._work = work
        self._monotonic = monotonic
        self._bounds = bounds
        self._backlog = LoadEstimate(lanes=1, patience_s=bounds.patience_s, always=bounds.at_once)
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._working: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def overloaded(self) -> bool:
        """Whether the next item would be rejected."""
        return self._backlog.full or len(self._waiting) >= self._bounds.most

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Add an item to the next group. Cancelling the future does not cancel the work.

        Raises:
            Overloaded: the item is rejected.
        """
        if self.overloaded:
            raise Overloaded(self._bounds.kind)
        done: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append((item, done))
        self._backlog.waiting += 1
        if self._working is None:
            self._working = self._loop.create_task(self._work_off())
        return done

    async def close(self) -> None:
        """Wait until every submitted item is done."""
        # A task that is cancelled before it starts never resets `_working`, hence `done`.
        while (working := self._working) is not None and not working.done():
            await asyncio.wait({working})

    async def _work_off(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._bounds.at_once))]
                self._backlog.waiting -= len(group)
                await self._work_on(group)
        finally:
            self._working = None

    async def _work_on(self, group: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        started = self._monotonic()
        try:
            results = await self._work([item for item, _ in group])
        except Exception as error:
            for _, done in group:
                if not done.done():
                    done.set_exception(error)
                    done.exception()  # retrieved, since the caller may be gone
            return
        self._backlog.worked(len(group), self._monotonic() - started)
        for (_, done), result in zip(group, results, strict=True):
            if not done.done():
                done.set_result(result)
