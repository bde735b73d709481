"""The near cache: profiles of the users who are asked for most, in this process's own memory.

A hit here asks no server, and is still never stale: each is held against the event log, not against the cache. All
processes share the log, and a look at its tail costs one PRAGMA if nothing was committed.
Invariant: what a read finds here accounts for every event that was committed before the read began, and is no older
than the last recall. Interleavings this excludes, R a reader, E an event's ingest, A an admin who rebuilds or erases:
  1. R reads the cache, E commit, E DEL, R keeps       the user's newest event is above the value's number: not kept
  2. E commit, R looks, R reads the cache, R keeps     the same; E's DEL is still to come, the log knows already
  3. R keeps, E commit, E answer, R finds              the look before each find drops the user
  4. R reads the cache, A writes, A recalls, R keeps   the look before keeping sees the recall: not kept
  5. R1 looks, E commit, E answer, R2 finds            a look serves one turn of the event loop, and R2 comes after it
  6. E commit, A erases (E is not in the log any more), R reads the cache, R keeps; E DEL, E answer; A settles
                                                       while a user is owed an invalidation, nothing is kept
Must not know Redis or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from app.errors import StoreUnavailable
from app.features.clock import Clock
from app.features.registry import Registry, indices
from app.profiles.online.cache_protocol import decode
from app.profiles.ports import EventTail

# Bounds what a step of the wall clock can do to an expiry, at the price of one MGET a minute for each user.
MAX_AGE_S = 60.0
MASKS_PER_USER = 8
# A proof is a look into the database on the event loop's thread: so many in one turn, and the others another time.
PROOFS_PER_TURN = 16


class _Kept(NamedTuple):
    """The JSON of each feature of a mask; until when, by the monotonic clock."""

    values: Sequence[bytes]
    until: float


class LocalCache:
    """One per process. Keeps at most `capacity` users; a user is kept when read from the cache for the second time."""

    def __init__(self, tail: EventTail, registry: Registry, clock: Clock, capacity: int) -> None:
        self._tail = tail
        self._registry = registry
        self._clock = clock
        self._capacity = capacity
        self._kept: dict[str, dict[int, _Kept]] = {}
        self._asked: set[str] = set()
        self._recalls = 0
        self._loop = asyncio.get_running_loop()
        self._looked: bool | None = None
        self._proofs = 0

    def find(self, user_id: str, mask: int) -> Sequence[bytes] | None:
        """The JSON of each feature of the mask, where the user is here with this mask."""
        of_user = self._kept.get(user_id) if self._kept and self._look() else None
        kept = of_user.get(mask) if of_user is not None else None
        return kept.values if kept is not None and self._clock.monotonic() < kept.until else None

    def mark(self) -> int:
        """Ask before the cache is read; what is read may be offered under this."""
        return self._recalls

    def offer(self, mark: int, user_id: str, mask: int, held: Sequence[bytes | None], values: Sequence[bytes]) -> None:
        """Keep what the cache held of a user, and the JSON in it, where the log proves it."""
        if user_id not in self._asked:
            if len(self._asked) >= self._capacity:
                self._asked.clear()
            self._asked.add(user_id)
            return
        if not self._look() or mark != self._recalls or self._proofs >= PROOFS_PER_TURN:
            return
        self._proofs += 1
        try:
            left_s = self._proved_for(user_id, mask, held)
        except StoreUnavailable:
            return
        if left_s > 0:
            self._keep(user_id, mask, _Kept(values, self._clock.monotonic() + left_s))

    def _look(self) -> bool:
        """Forget what is no longer true; False if that cannot be told.

        Who runs in the same turn of the event loop shares a look. The turn's end is put in line before the look is
        taken: whoever comes before it stood in line, and so had begun, before the look.
        """
        if self._looked is None:
            self._loop.call_soon(self._turn_over)
            self._looked = self._look_now()
        return self._looked

    def _look_now(self) -> bool:
        try:
            touched = self._tail.look()
        except StoreUnavailable:
            return False
        if touched is None:
            self._kept.clear()
            self._recalls += 1
        else:
            for user_id in touched:
                self._kept.pop(user_id, None)
        return True

    def _turn_over(self) -> None:
        self._looked = None
        self._proofs = 0

    def _proved_for(self, user_id: str, mask: int, held: Sequence[bytes | None]) -> float:
        """How many seconds the values may be kept; 0 where one is older than an event that makes it untrue."""
        newest = self._tail.newest(user_id)
        if newest is None:
            return 0.0
        expires_at_ms: list[int] = []
        for index, raw in zip(indices(mask), held, strict=True):
            value = decode(raw)
            if value is None or value.is_stale(self._registry[index].newest_event(newest)):
                return 0.0
            expires_at_ms.append(value.expires_at_ms or 0)
        return min((min(expires_at_ms) - self._clock.now_ms()) / 1000, MAX_AGE_S)

    def _keep(self, user_id: str, mask: int, kept: _Kept) -> None:
        of_user = self._kept.pop(user_id, {})
        if len(of_user) >= MASKS_PER_USER:
            of_user.clear()
        if len(self._kept) >= self._capacity:
            del self._kept[next(iter(self._kept))]
        of_user[mask] = kept
        self._kept[user_id] = of_user  # last, for the first is the next to go
