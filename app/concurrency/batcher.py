"""Batcher: what waits at the same time is done together, one group after the other.

A hop to the database's thread, or a durable commit, costs about the same for one as for many. Memory is bounded: who
would wait too long is told so at once (`app.concurrency.load_estimate`), and so is who would be one too many.
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
    """`kind` names the load when it is too much; up to `at_once` items are one group, and `most` may wait."""

    kind: str
    at_once: int
    patience_s: float
    most: int


class Batcher(Generic[Item, Result]):
    """Hands groups of items to `work`, which gives one result an item, or raises for all of them."""

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
        """Whether what came now would wait too long."""
        return self._backlog.full or len(self._waiting) >= self._bounds.most

    def join(self, item: Item) -> asyncio.Future[Result]:
        """Have an item done in the next round that has room for it. Who stops waiting for it does not undo it.

        Raises:
            Overloaded: too much waits already; nothing is done.
        """
        if self.overloaded:
            raise Overloaded(self._bounds.kind)
        done: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append((item, done))
        self._backlog.waiting += 1
        if self._working is None:
            self._working = self._loop.create_task(self._take_rounds())
        return done

    async def close(self) -> None:
        """Finish what was begun."""
        # Looked at by `done`: a task that is cancelled before it has begun clears nothing behind it.
        while (working := self._working) is not None and not working.done():
            await asyncio.wait({working})

    async def _take_rounds(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._bounds.at_once))]
                self._backlog.waiting -= len(group)
                await self._take_round(group)
        finally:
            self._working = None

    async def _take_round(self, group: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        started = self._monotonic()
        try:
            results = await self._work([item for item, _ in group])
        except Exception as error:
            for _, done in group:
                if not done.done():
                    done.set_exception(error)
                    done.exception()  # marked as seen: whoever waited may be gone
            return
        self._backlog.worked(len(group), self._monotonic() - started)
        for (_, done), result in zip(group, results, strict=True):
            if not done.done():
                done.set_result(result)
