"""How long whoever comes now would wait, judged by how much waits and how fast it was worked off lately.

A queue that may grow without bound turns too much load into ever longer waits: everybody is answered, too late for all.
So who would wait too long is told so at once, and what was let in is answered in bounded time. Nothing here is set by
hand to what a machine can do; it is measured as it works. Time is handed in.
"""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest piece of work, in the averages


class LoadEstimate:
    """One kind of work, done by `lanes` at once. `waiting` is counted by whoever keeps the queue."""

    __slots__ = ("_always", "_lanes", "_patience_s", "_seconds", "_units", "waiting")

    def __init__(self, *, lanes: int, patience_s: float, always: int) -> None:
        """Up to `always` units may wait in any case: one slow piece of work is not yet an overload."""
        self._lanes = lanes
        self._patience_s = patience_s
        self._always = always
        self._seconds = 0.0
        self._units = 0.0
        self.waiting = 0

    def worked(self, units: int, seconds: float) -> None:
        """Note that a piece of work took so long."""
        # Averaged apart: a small piece of work that was held up says little of what a large one takes for each unit.
        self._seconds += _WEIGHT * (seconds - self._seconds)
        self._units += _WEIGHT * (units - self._units)

    @property
    def wait_s(self) -> float:
        """What somebody who came now would wait."""
        return self.waiting * self._seconds / self._units / self._lanes if self._units else 0.0

    @property
    def full(self) -> bool:
        """Whether that is too long."""
        return self.waiting > self._always and self.wait_s > self._patience_s
