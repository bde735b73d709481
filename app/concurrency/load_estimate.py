"""Estimates the queueing delay of the next request, from the length of the queue and the recent service rate.

An unbounded queue turns overload into ever longer waits, until every answer comes too late. A request that would wait
too long is therefore rejected at once, and admitted requests are answered in bounded time. No capacity is configured:
the service rate is measured while the process works.
"""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest sample in the moving averages


class LoadEstimate:
    """Estimates how long new work would wait in one queue. The owner of the queue keeps `waiting`, the number of units
    (events or users, for example) in the queue, up to date, and reports finished units with `worked`."""

    __slots__ = ("_always", "_lanes", "_patience_s", "_seconds", "_units", "waiting")

    def __init__(self, *, lanes: int, patience_s: float, always: int) -> None:
        """
        `lanes`: how many pieces of work run at once.
        `patience_s`: the queue is full if the estimated wait is longer than this, in seconds.
        `always`: up to this many units may wait whatever the estimate says, because one slow piece of work is not an
            overload.
        """
        self._lanes = lanes
        self._patience_s = patience_s
        self._always = always
        self._seconds = 0.0
        self._units = 0.0
        self.waiting = 0

    def worked(self, units: int, seconds: float) -> None:
        # Two averages instead of one of the time per unit, which a small piece that was held up would distort.
        self._seconds += _WEIGHT * (seconds - self._seconds)
        self._units += _WEIGHT * (units - self._units)

    @property
    def full(self) -> bool:
        """Whether the next request should be rejected because it would wait too long."""
        if self.waiting <= self._always or not self._units:
            return False
        return self.waiting * self._seconds / self._units / self._lanes > self._patience_s
