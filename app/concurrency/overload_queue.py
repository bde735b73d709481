"""An overload queue: requests that will probably be shed wait briefly before they are rejected.

Rejecting costs time, too. If ten times as many requests arrive as can be served, an event loop that rejects each one at
once does nothing else: cache hits wait behind rejections, and so do admitted requests. During overload, requests
therefore line up and are taken a few at a time, with rests between. A request that is shed in the end loses little,
clients that wait for an answer send less, and a cache hit in the line is still found.

Invariant: while requests wait, the loop rests `RESTS` times as long as the last group took. No request waits longer
than `most_s` plus the group under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic

AT_ONCE = 32
# Turns of the event loop that a group gets before its time is measured.
LOOP_TURNS = 4
RESTS = 9
REST_MOST_S = 0.1


class OverloadQueue:
    """One queue per process and kind of load."""

    def __init__(
        self,
        most_s: float,
        now: Callable[[], float] = monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`most_s`: the longest wait."""
        self._most_s = most_s
        self._now = now
        self._pause = pause
        self._waiting: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._taking: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether no request waits and the last group has had its time."""
        return self._taking is None or self._taking.done()

    async def wait(self) -> bool:
        """Wait for the caller's turn; False if `most_s` passed first, and the request must be shed."""
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((self._now() + self._most_s, taken))
        if self.idle:
            self._taking = loop.create_task(self._take())
        return await taken

    async def close(self) -> None:
        """Admit every request that still waits."""
        while self._waiting:
            _release(self._waiting.popleft()[1], admitted=True)
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait({self._taking})

    async def _take(self) -> None:
        while self._waiting:
            began = self._now()
            while self._waiting and self._waiting[0][0] <= began:
                _release(self._waiting.popleft()[1], admitted=False)
            for _ in range(min(AT_ONCE, len(self._waiting))):
                _release(self._waiting.popleft()[1], admitted=True)
            for _ in range(LOOP_TURNS):
                await self._pause(0)
            if self._waiting:
                await self._pause(min(REST_MOST_S, RESTS * (self._now() - began)))


def _release(taken: asyncio.Future[bool], *, admitted: bool) -> None:
    if not taken.done():  # the request may have been cancelled
        taken.set_result(admitted)
