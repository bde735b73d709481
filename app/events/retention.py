"""Deletes rows that are older than their retention, every night, in small transactions that delay no other writer.

A run deletes the rows before its *cutoff*. Invariant: the cutoff moves by at most `LARGEST_MOVE_MS` from one run to the
next, so a wrong clock deletes no more than that. A first run that would delete more waits for an admin's confirmation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from app.features.clock import DAY_MS, Clock
from app.telemetry import logger

STEP = 1_000
PAUSE_S = 0.02
LARGEST_MOVE_MS = 3 * DAY_MS
log = logger("events.retention")


class Prunable(Protocol):
    async def oldest_ms(self) -> int | None:
        """The time of the oldest row; None if there is none."""

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` of the oldest rows before a time; return how many were deleted."""


class Cutoffs(Protocol):
    async def cutoff(self, what: str) -> int | None:
        """The cutoff of the last run for rows of the kind `what`; None if there was no run."""

    async def set_cutoff(self, what: str, cutoff_ms: int, deletes_before_ms: int | None) -> None:
        """Store the cutoff of a run before the run deletes the rows before `deletes_before_ms`, None if there are no
        such rows. The cutoff may move back; of all `deletes_before_ms`, the latest is kept."""


def next_cutoff(wanted_ms: int, done_ms: int | None, oldest_ms: int | None) -> int | None:
    """The cutoff of the next run; None if an admin must confirm the run. `wanted_ms` is the current time minus the
    retention, `done_ms` the cutoff of the previous run (None: there was none), and `oldest_ms` the time of the oldest
    row. The cutoff may move back, too: otherwise a clock that was ahead once would keep it ahead."""
    if done_ms is not None:
        return max(done_ms - LARGEST_MOVE_MS, min(done_ms + LARGEST_MOVE_MS, wanted_ms))
    return wanted_ms if oldest_ms is None or oldest_ms >= wanted_ms - LARGEST_MOVE_MS else None


class Retention(msgspec.Struct, frozen=True):
    """Deletes rows that are older than their retention. `kept`: by kind of row (`events`, `decisions`), the store and
    the days for which the rows are kept. Every method raises `StoreUnavailable`."""

    kept: Mapping[str, tuple[Prunable, int]]
    cutoffs: Cutoffs
    clock: Clock

    async def waiting(self) -> list[str]:
        """The kinds of rows that are not deleted because their first deletion waits for an admin's confirmation."""
        cutoffs = await self.next_cutoffs()
        return [what for what in self.kept if what not in cutoffs]

    async def next_cutoffs(self, *, confirmed: bool = False) -> dict[str, int]:
        """The cutoff of the next run by kind of row, without the kinds that are `waiting`. `confirmed`: no kind waits,
        and every row is deleted that is expired by the clock."""
        found: dict[str, int] = {}
        for what, (store, days) in self.kept.items():
            wanted_ms, done_ms = self._wanted_ms(days), await self.cutoffs.cutoff(what)
            limited_ms = next_cutoff(wanted_ms, done_ms, await store.oldest_ms())
            if (cutoff_ms := wanted_ms if confirmed else limited_ms) is not None:
                found[what] = cutoff_ms
        return found

    async def prune(
        self, cutoffs: Mapping[str, int], pause: Callable[[float], Awaitable[None]], budget_s: float = float("inf")
    ) -> dict[str, int] | None:
        """Delete the rows before the `next_cutoffs` for about `budget_s` seconds. Return the number of deleted rows by
        kind, or None if the time was up before all were deleted; repeat it then, with the same cutoffs."""
        deadline = self.clock.monotonic() + budget_s
        gone: dict[str, int] = {}
        finished = True
        for what, (store, days) in self.kept.items():
            if (cutoff_ms := cutoffs.get(what)) is None:
                log.warning("pruning_waits", what=what, remedy="profiles prune --confirm")
                continue
            before_ms = min(cutoff_ms, self._wanted_ms(days))
            oldest_ms = await store.oldest_ms()
            deletes = oldest_ms is not None and oldest_ms < before_ms
            await self.cutoffs.set_cutoff(what, cutoff_ms, before_ms if deletes else None)
            gone[what] = 0
            while count := await store.prune(before_ms, STEP):
                gone[what] += count
                if self.clock.monotonic() > deadline:
                    finished = False
                    break
                await pause(PAUSE_S)
            log.info("pruned", what=what, rows=gone[what], finished=finished)
        return gone if finished else None

    def _wanted_ms(self, days: int) -> int:
        return self.clock.now_ms() - days * DAY_MS
