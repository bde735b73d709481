"""Admission under overload: an estimate of the queueing delay, and a queue of requests that will probably be shed.

No capacity is configured: the service rate is measured while the process works. During overload, requests that will
probably be rejected wait in the overload queue and are released in groups, to be checked again (`app/README.md` has the
reasons).

Invariant: after each group, the queue pauses for `PAUSE_FACTOR` times the time that the group took, but at most for
`PAUSE_MOST_S`. A request waits at most `most_s` seconds, plus the time of one group and one pause.
"""

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
_WEIGHT = 0.1  # of the newest sample in the moving averages


class LoadEstimate(msgspec.Struct, kw_only=True, eq=False):
    """Estimates how long new work would wait in one queue, in which `lanes` pieces of work run at once. The owner of
    the queue keeps `waiting`, the number of units in it, up to date, and reports finished units with `worked`. The
    queue is full if the estimated wait is longer than `patience_s` seconds. Up to `always` units may wait whatever the
    estimate says, because one slow piece of work is not an overload."""

    lanes: int
    patience_s: float
    always: int
    waiting: int = 0
    _seconds: float = 0.0
    _units: float = 0.0

    def worked(self, units: int, seconds: float) -> None:
        # Seconds and units are averaged separately: one slow small piece would distort an average of their quotient.
        self._seconds += _WEIGHT * (seconds - self._seconds)
        self._units += _WEIGHT * (units - self._units)

    @property
    def full(self) -> bool:
        """Whether the next request should be rejected because it would wait too long."""
        if self.waiting <= self.always or not self._units:
            return False
        return self.waiting * self._seconds / self._units / self.lanes > self.patience_s


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
