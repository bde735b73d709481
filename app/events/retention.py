"""Retention: what is older than a setting goes, night by night, in small steps, so that no other writer waits long.

Invariant: a run's cutoff is at most `LARGEST_MOVE_MS` from that of the run before, so that a clock that is wrong for a
night deletes no more than that. What a first run would delete beyond it waits until an admin confirms it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from app.features.clock import DAY_MS, Clock
from app.telemetry import logger

STEP = 1_000
PAUSE_S = 0.02
LARGEST_MOVE_MS = 3 * DAY_MS
log = logger("events.retention")


class Prunable(Protocol):
    """Where something is kept that grows old."""

    async def oldest_ms(self) -> int | None:
        """The moment of the oldest; None if there is nothing."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` of the oldest that are of before a moment; how many went."""
        ...


class Cutoffs(Protocol):
    """Remembers up to which moment each kind has been deleted."""

    async def cutoff(self, what: str) -> int | None:
        """That moment; None before the first run."""
        ...

    async def set_cutoff(self, what: str, cutoff_ms: int) -> None:
        """To be called before anything is deleted up to there."""
        ...


class Kept(NamedTuple):
    """A kind of thing that grows old (`events`, `decisions`), where it is, and for how many days it is kept."""

    what: str
    store: Prunable
    days: int


def next_cutoff(wanted_ms: int, done_ms: int | None, oldest_ms: int | None) -> int | None:
    """The cutoff of a run, which deletes nothing beyond it; None if the run waits for confirmation.

    `wanted_ms` is what the clock and the setting say, `done_ms` the cutoff of the run before. A cutoff moves back as
    slowly as it moves on: after a night with a clock far behind it soon is where it was.
    """
    if done_ms is not None:
        return max(done_ms - LARGEST_MOVE_MS, min(done_ms + LARGEST_MOVE_MS, wanted_ms))
    return wanted_ms if oldest_ms is None or oldest_ms >= wanted_ms - LARGEST_MOVE_MS else None


class Retention:
    """Deletes what has been kept for long enough. Every method raises `StoreUnavailable`."""

    def __init__(self, kept: Sequence[Kept], cutoffs: Cutoffs, clock: Clock) -> None:
        self._kept = kept
        self._cutoffs = cutoffs
        self._clock = clock

    async def waiting(self) -> list[str]:
        """The kinds whose first run waits for confirmation."""
        return [kept.what for kept in self._kept if await self._next(kept, go_on=False) is None]

    async def prune(
        self,
        pause: Callable[[float], Awaitable[None]],
        budget_s: float = float("inf"),
        *,
        go_on: bool = False,
        confirmed: bool = False,
    ) -> dict[str, int] | None:
        """Delete for about `budget_s` seconds; how many went of each kind, or None if more are left.

        `go_on`: up to where the run before was to delete. `confirmed`: all that is too old by this machine's clock.
        """
        deadline = self._clock.monotonic() + budget_s
        gone: dict[str, int] = {}
        finished = True
        for kept in self._kept:
            wanted_ms = self._wanted_ms(kept)
            cutoff_ms = wanted_ms if confirmed else await self._next(kept, go_on=go_on)
            if cutoff_ms is None:
                log.warning("pruning_waits", what=kept.what, remedy="profiles prune --confirm")
                continue
            await self._cutoffs.set_cutoff(kept.what, cutoff_ms)
            gone[kept.what] = 0
            while count := await kept.store.prune(min(cutoff_ms, wanted_ms), STEP):
                gone[kept.what] += count
                if self._clock.monotonic() > deadline:
                    finished = False
                    break
                await pause(PAUSE_S)
            log.info("pruned", what=kept.what, rows=gone[kept.what], finished=finished)
        return gone if finished else None

    def _wanted_ms(self, kept: Kept) -> int:
        return self._clock.now_ms() - kept.days * DAY_MS

    async def _next(self, kept: Kept, *, go_on: bool) -> int | None:
        done_ms = await self._cutoffs.cutoff(kept.what)
        if go_on and done_ms is not None:
            return done_ms
        return next_cutoff(self._wanted_ms(kept), done_ms, await kept.store.oldest_ms())
