"""Deletes rows that are older than their retention, every night, in small transactions that delay no other writer.

A kind of row has a *cutoff*, which moves every night; the rows before it are deleted. Invariant: a cutoff moves by at
most `LARGEST_MOVE_MS` at a time, so a wrong clock deletes no more than that. A first move that would delete more waits
for an admin's confirmation.
"""

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
        """The cutoff of the kind `what`; None if it was never stored."""

    async def move(self, cutoffs: Mapping[str, int], night: int | None) -> bool:
        """Store cutoffs by kind of row; they may move back. If cutoffs have been stored in the same `night` already,
        store nothing and return False. If `night` is None, store them in any case."""

    async def deleting(self, what: str, before_ms: int) -> None:
        """Record that rows before `before_ms` are about to be deleted, unless a later time is recorded already."""


def next_cutoff(wanted_ms: int, done_ms: int | None, oldest_ms: int | None) -> int | None:
    """The next cutoff of a kind of row; None if an admin must confirm it. `wanted_ms` is the current time minus the
    retention, `done_ms` the present cutoff (None: there is none), and `oldest_ms` the time of the oldest row. The
    cutoff may move back, too: otherwise a clock that was ahead once would keep it ahead."""
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
        """The next cutoff by kind of row, without the kinds that are `waiting`. If `confirmed`, no kind waits, and
        each cutoff moves as far as the retention allows."""
        found: dict[str, int] = {}
        for what, (store, days) in self.kept.items():
            wanted_ms, done_ms = self._wanted_ms(days), await self.cutoffs.cutoff(what)
            limited_ms = next_cutoff(wanted_ms, done_ms, await store.oldest_ms())
            if (cutoff_ms := wanted_ms if confirmed else limited_ms) is not None:
                found[what] = cutoff_ms
        return found

    async def move_cutoffs(self, night: int | None = None, *, confirmed: bool = False) -> bool:
        """Store the `next_cutoffs`. If a process has done so in the same `night` (in days since 1970), return False."""
        cutoffs = await self.next_cutoffs(confirmed=confirmed)
        if moved := await self.cutoffs.move(cutoffs, night):
            for what in self.kept.keys() - cutoffs.keys():
                log.warning("pruning_waits", what=what, remedy="profiles prune --confirm")
        return moved

    async def prune(self, pause: Callable[[float], Awaitable[None]], *, thorough: bool = True) -> dict[str, int]:
        """Delete the rows before the stored cutoffs. Return the number of deleted rows for each kind of row; a kind
        without a stored cutoff is left out. For a kind without rows before its cutoff, `Prunable.prune` is called only
        if `thorough`: it may also delete other data that are no longer needed, such as replaced pooled priors."""
        gone: dict[str, int] = {}
        for what, (store, days) in self.kept.items():
            if (cutoff_ms := await self.cutoffs.cutoff(what)) is None:
                continue
            gone[what] = 0
            before_ms = min(cutoff_ms, self._wanted_ms(days))
            oldest_ms = await store.oldest_ms()
            if oldest_ms is not None and oldest_ms < before_ms:
                await self.cutoffs.deleting(what, before_ms)
            elif not thorough:
                continue
            while count := await store.prune(before_ms, STEP):
                gone[what] += count
                await pause(PAUSE_S)
            log.info("pruned", what=what, rows=gone[what])
        return gone

    def _wanted_ms(self, days: int) -> int:
        return self.clock.now_ms() - days * DAY_MS
