"""OverloadQueue: who will most likely be sent away waits until there is time for it.

To send somebody away costs, too. Where ten times as much comes as can be done, a loop that does it at once does nothing
else: hits wait behind refusals, and what was let in waits as well. So while there is too much, those who come line up,
and are taken a few at a time, with rests between. Nobody is the worse for it: whoever is sent away was to wait anyway,
clients that wait for an answer ask less often, and a hit among them is found all the same.

Invariant: while some wait, the turns of the loop in which others are taken are followed by a rest `RESTS` times as
long; and nobody waits longer than is allowed, and what is under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic

AT_ONCE = 32
# Of the loop, from when some are taken to when they have been answered, as far as that takes no work of others.
LOOP_TURNS = 4
RESTS = 9
REST_MOST_S = 0.1


class OverloadQueue:
    """One process's, for something that it may have too much of."""

    def __init__(
        self,
        most_s: float,
        now: Callable[[], float] = monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`most_s`: how long somebody may wait."""
        self._most_s = most_s
        self._now = now
        self._pause = pause
        self._waiting: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._taking: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits, and the last ones have had their time."""
        return self._taking is None or self._taking.done()

    async def wait(self) -> bool:
        """Return when it is the caller's turn: True; or False where that takes too long, and no more should be done."""
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((self._now() + self._most_s, taken))
        if self.idle:
            self._taking = loop.create_task(self._take())
        return await taken

    async def close(self) -> None:
        """Whoever still waits is given its turn."""
        while self._waiting:
            _give(self._waiting.popleft()[1], in_time=True)
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait({self._taking})

    async def _take(self) -> None:
        while self._waiting:
            began = self._now()
            while self._waiting and self._waiting[0][0] <= began:
                _give(self._waiting.popleft()[1], in_time=False)
            for _ in range(min(AT_ONCE, len(self._waiting))):
                _give(self._waiting.popleft()[1], in_time=True)
            for _ in range(LOOP_TURNS):
                await self._pause(0)
            if self._waiting:
                await self._pause(min(REST_MOST_S, RESTS * (self._now() - began)))


def _give(taken: asyncio.Future[bool], *, in_time: bool) -> None:
    if not taken.done():  # its request may have been cancelled
        taken.set_result(in_time)
