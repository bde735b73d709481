"""The local cache: profiles of the most frequently read users, in the memory of this process.

A hit asks no server and is never stale, because each entry is checked against the event log, which all processes share.
Below, "the cache" is the shared cache, Redis or Valkey. A read *keeps* a profile by storing it in the local cache, and
*finds* a profile if the local cache answers the read.

Invariant: a profile that a read finds reflects every event committed before the read began, and was read after the
last rebuild or erasure, which clears the local caches of all processes. A *check* drops the profiles of users with new
events, or all profiles after a clearing. Interleavings prevented; R is a reader, E the ingest of an event, A an admin
who rebuilds or erases:
  1. R reads the cache, E commit, E DEL, R keeps       the user's newest event is above the value's version: not kept
  2. E commit, R checks, R reads the cache, R keeps    not kept: the cache is stale until E's DEL, but the log has E
  3. R keeps, E commit, E answer, R finds              the check before each find drops the user
  4. R reads the cache, A writes, A clears, R keeps    the check before keeping sees the clearing: not kept
  5. R1 checks, E commit, E answer, R2 finds           a check serves one tick of the event loop, and R2 comes after it
  6. E commit, A erases (E is not in the log any more), R reads the cache, R keeps; E DEL, E answer; A DEL
                                                       until A's DEL, the database records it as owed: not kept
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from app.errors import StoreUnavailable
from app.features.clock import CLOCK_SKEW_MS, Clock
from app.features.registry import Registry, indices
from app.profiles.online.cache_protocol import FeatureValue, decode
from app.profiles.ports import ChangeFeed

MASKS_PER_USER = 8
# A proof queries the database on the event loop's thread, so the number in one tick is limited.
PROOFS_PER_TICK = 16


class KeptProfile(NamedTuple):
    """A user's profile: the JSON and the version of each feature of a mask. It may be served from `computed_at_ms`,
    when its newest value was computed, until before `expires_at_ms`, when its first value expires."""

    values: Sequence[bytes]
    versions: Sequence[int]
    computed_at_ms: int
    expires_at_ms: int

    def is_current(self, now_ms: int) -> bool:
        return self.computed_at_ms <= now_ms + CLOCK_SKEW_MS and now_ms < self.expires_at_ms


class LocalCache(msgspec.Struct, eq=False):
    """Keeps the profiles of at most `capacity` users. A profile is kept by the second read of its user
    that the shared cache answers, at the earliest. So users who are read once do not displace others."""

    feed: ChangeFeed
    registry: Registry
    clock: Clock
    capacity: int
    cleared: int = 0  # how many times
    _kept: dict[str, dict[int, KeptProfile]] = msgspec.field(default_factory=dict)
    _seen: set[str] = msgspec.field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = msgspec.field(default_factory=asyncio.get_running_loop)
    _checked: bool | None = None
    _proofs: int = 0

    def find(self, user_id: str, mask: int, now_ms: int) -> KeptProfile | None:
        """The user's profile with exactly the features of the mask; None if there is none or it has expired."""
        if self._checked is None and user_id not in self._kept:
            return None  # a miss costs no check of the change feed
        of_user = self._kept.get(user_id) if self._check() else None
        kept = of_user.get(mask) if of_user is not None else None
        return kept if kept is not None and kept.is_current(now_ms) else None

    def find_all(self, wanted: Mapping[str, int], now_ms: int) -> dict[str, Sequence[bytes]]:
        """The values of each profile that `find` would find, by user id. Faster than a call of `find` for each user."""
        if (self._checked is None and self._kept.keys().isdisjoint(wanted)) or not self._check():
            return {}
        return {
            user_id: kept.values
            for user_id, mask in wanted.items()
            if (of_user := self._kept.get(user_id)) is not None
            and (kept := of_user.get(mask)) is not None
            and kept.is_current(now_ms)
        }

    def offer(self, mark: int, user_id: str, mask: int, held: Sequence[bytes | None], values: Sequence[bytes]) -> None:
        """Keep a user's profile if the event log proves that it is current. `mark` is what `cleared` was before the
        shared cache was read, `held` the contents of the user's keys, and `values` the JSON in them."""
        if user_id not in self._seen:
            if len(self._seen) >= self.capacity:
                self._seen.clear()
            self._seen.add(user_id)
            return
        kept = self._kept.get(user_id, {}).get(mask)
        if kept is not None and kept.is_current(self.clock.now_ms()):
            return  # every find checks it
        if not self._check() or mark != self.cleared or self._proofs >= PROOFS_PER_TICK:
            return
        self._proofs += 1
        try:
            kept = self._proved(user_id, mask, held, values)
        except StoreUnavailable:
            return
        if kept is None or not kept.is_current(self.clock.now_ms()):
            return
        of_user = self._kept.pop(user_id, {})
        if len(of_user) >= MASKS_PER_USER:
            of_user.clear()
        if len(self._kept) >= self.capacity:
            del self._kept[next(iter(self._kept))]
        of_user[mask] = kept
        self._kept[user_id] = of_user  # at the end: the first one is evicted next

    def _check(self) -> bool:
        """Drop the entries of users with new events; return False if the database does not answer. Calls in one tick of
        the event loop share one query. Its result is discarded before the loop handles any later request."""
        if self._checked is not None:
            return self._checked
        self._loop.call_soon(self._tick_over)
        try:
            changed = self.feed.changed_users()
        except StoreUnavailable:
            self._checked = False
            return False
        if changed is None:
            self._kept.clear()
            self.cleared += 1
        else:
            for user_id in changed:
                self._kept.pop(user_id, None)
        self._checked = True
        return True

    def _tick_over(self) -> None:
        self._checked = None
        self._proofs = 0

    def _proved(
        self, user_id: str, mask: int, held: Sequence[bytes | None], values: Sequence[bytes]
    ) -> KeptProfile | None:
        """Make an entry of a user's profile; None unless the event log proves that every value is current."""
        newest = self.feed.newest(user_id)
        if newest is None:
            return None
        found: list[FeatureValue] = []
        for index, raw in zip(indices(mask), held, strict=True):
            value = decode(raw)
            if value is None or value.is_stale(self.registry[index].newest_event(newest)):
                return None
            found.append(value)
        return KeptProfile(
            values,
            [value.version for value in found],
            max(value.computed_at_ms for value in found),
            min(value.expires_at_ms or 0 for value in found),
        )
