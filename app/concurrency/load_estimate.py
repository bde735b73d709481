"""Estimates the queueing delay of the next request, from the length of the queue and the recent service rate.

An unbounded queue turns overload into ever longer waits, until every answer comes too late. A request that would wait
too long is therefore rejected at once, and admitted requests are answered in bounded time. No capacity is configured:
the service rate is measured while the process works.
"""

from __future__ import annotations

import msgspec

_WEIGHT = 0.1  # of the newest sample in the moving averages


class LoadEstimate(msgspec.Struct, kw_only=True, eq=False):
    """Estimates how long new work would wait in one queue. The owner of the queue keeps `waiting`, the number of units
    (events or users, for example) in the queue, up to date, and reports finished units with `worked`.

    `lanes`: how many pieces of work run at once.
    `patience_s`: the queue is full if the estimated wait is longer than this, in seconds.
    `always`: up to this many units may wait whatever the estimate says, because one slow piece of work is not an
        overload.
    """

    lanes: int
    patience_s: float
    always: int
    waiting: int = 0
    _seconds: float = 0.0
    _units: float = 0.0

    def worked(self, units: int, seconds: float) -> None:
        # Two averages instead of one of the time per unit, which a small piece that was held up would distort.
        self._seconds += _WEIGHT * (seconds - self._seconds)
        self._units += _WEIGHT * (units - self._units)

    @property
    def full(self) -> bool:
        """Whether the next request should be rejected because it would wait too long."""
        if self.waiting <= self.always or not self._units:
            return False
        return self.waiting * self._seconds / self._units / self.lanes > self.patience_s
