"""An overload queue: requests that will probably be shed wait briefly before they are rejected.

A rejection costs time, too. If ten times as many requests arrive as can be served, an event loop that rejects each one
at once has no time left: cache hits and admitted requests wait behind rejections. During overload, requests therefore
wait in this queue and are released in groups, with pauses between the groups. The wait slows down the clients that
cause the overload, because a client that waits for its answer sends no other request. A released request is checked
again: by then it may be a cache hit, or there may be capacity for it.

In a trial, a jittered sleep and a second check instead of the queue served as many requests. But the sleeping requests
still loaded the process after their clients had left, which failed three of seven runs of the benchmark `overload`.

Invariant: while requests wait, the queue pauses for `PAUSE_FACTOR` times the time that the last group took, at most
`PAUSE_MOST_S`. A request waits at most `most_s` seconds, plus the pause and the group under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic

import msgspec

AT_ONCE = 32
# Turns of the event loop in which a group runs before its time is measured.
LOOP_TURNS = 4
PAUSE_FACTOR = 9
PAUSE_MOST_S = 0.1


class OverloadQueue(msgspec.Struct, eq=False):
    """Delays requests during overload and releases them in groups. Each process has one instance per kind of load.
    `most_s`: the longest wait before a request is shed, in seconds."""

    most_s: float
    now: Callable[[], float] = monotonic
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    _waiting: deque[tuple[float, asyncio.Future[bool]]] = msgspec.field(default_factory=deque)
    _releasing: asyncio.Task[None] | None = None

    async def wait(self) -> bool:
        """Wait until the request is released; return False if `most_s` passed first, so that it must be shed."""
        loop = asyncio.get_running_loop()
        released: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((self.now() + self.most_s, released))
        if self._releasing is None or self._releasing.done():
            self._releasing = loop.create_task(self._release())
        return await released

    async def close(self) -> None:
        """Release every request that still waits, and stop."""
        while self._waiting:
            _end(self._waiting.popleft()[1], in_time=True)
        if self._releasing is not None:
            self._releasing.cancel()
            await asyncio.wait({self._releasing})

    async def _release(self) -> None:
        while self._waiting:
            began = self.now()
            while self._waiting and self._waiting[0][0] <= began:
                _end(self._waiting.popleft()[1], in_time=False)
            for _ in range(min(AT_ONCE, len(self._waiting))):
                _end(self._waiting.popleft()[1], in_time=True)
            for _ in range(LOOP_TURNS):
                await self.pause(0)
            if self._waiting:
                await self.pause(min(PAUSE_MOST_S, PAUSE_FACTOR * (self.now() - began)))


def _end(released: asyncio.Future[bool], *, in_time: bool) -> None:
    if not released.done():  # the request may have been cancelled
        released.set_result(in_time)
