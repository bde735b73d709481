"""The cache protocol: the content of keys, when a hit may be served, and how a computed value enters the cache.

A key holds a value `V…` or a lease `L…`, as bytes:

    V<fingerprint>:<version>:<computed_ms>:<expires_ms>:<JSON>      L<nonce>

The version of a value is the sequence number of the user's newest event in the snapshot that the value was computed
from. Sequence numbers are never reused, so a value is stale if and only if its version is lower than the number of an
event that invalidates the value. If the user has no event, the version is minus the number of erasures so far, so that
no version repeats when the user is erased.

A reader that finds an empty key writes a lease, a random nonce, before it reads the database. The bytes that the key
then holds are the reader's *token*: a computed value is stored by compare-and-set, only if the key still holds the
token. A reader that replaces a value uses the bytes of that value as its token. Values with equal bytes were computed
from the same events at the same time, since the version and the time are among the bytes. The JSON comes last and
verbatim, so a hit is answered without decoding.

Invariant of fills: the token of a fill was taken before the snapshot that the value was computed from. Each
invalidation deletes the key after the commit, so a token that is still in the key proves that no DEL came in between.
Interleavings prevented; R is a reader, E the ingest of an event:
  1. R token, R snapshot, E commit, E DEL, R fill       the token is gone: refused
  2. R token, E commit, R snapshot, E DEL, R fill       refused, although the value was right: harmless
  3. R token, R snapshot, E commit, R fill, E DEL       the fill lands and the DEL removes it
  4. R1 token, R1 snapshot, E commit, E DEL, R2 token, R1 fill     R2's lease has another nonce: refused
  5. E commit, R1 token (a value from before E), R1 snapshot, E DEL, erasure, R2 fill, R1 fill
                                                        R2's value has another version than R1's token: refused

Invariant of expiry: a value equals a computation at every moment from `computed_ms` until before `expires_ms`, unless
an event invalidates the value. A value expires when its TTL is over, or when the oldest event leaves the feature's
window, whichever comes first. A value is a hit only while this process's clock is between the two times. As the clock
of another process may be ahead, a value is also a hit if `computed_ms` lies up to `CLOCK_SKEW_MS` ahead.

Invariant of hits: an invalidation is *owed* if the DEL failed; the request that needs the DEL records this in the
database, and is answered `HOLD_BACK_S` later. A read serves a user's hits only if a query for owed invalidations began
at most `CHECK_VALID_S` before the read and found none in the user's hash slot (`TrustGate.check`). So when the request
is answered, no process serves hits by a query that ran before the record.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from app.errors import CacheUnavailable, StoreUnavailable
from app.features.clock import CLOCK_SKEW_MS, Clock
from app.features.registry import Registry, indices
from app.profiles.ports import EVERY_SLOT, Cache, Cell, Epoch, Fill, ObservedState, State
from app.telemetry import Metrics

VALUE = b"V"
LEASE = b"L"
NULL = b"null"
_PARTS = 5
# Times in values have 13 digits, so that they compare as bytes. This is the year 2286.
LAST_EXPIRY_MS = 9_999_999_999_999
# Fills are sent after this delay, so that the answers go out first and the fills of several misses share a write.
FILL_AFTER_S = 0.002
# Masks come from the names in requests, so their number must be bounded.
MASKS_CAP = 1_024
CHECK_VALID_S = 0.050
HOLD_BACK_S = 0.100
_EVERYONE = frozenset((EVERY_SLOT,))


class FeatureValue(NamedTuple):
    """One feature of one user, as cached, computed and answered; the first five fields are what a key holds.

    `fingerprint` identifies the definition of the feature. `version` is the sequence number of the user's newest event
    that the computation saw; at most 0 if there was none. `expires_at_ms` is None if the value must not be cached.
    `cached`: the value came from the cache. If the value could not be computed, `json` is null and `error` is the
    reason. `unproven`: the cached value may be stale, because the database could not be asked.
    """

    fingerprint: bytes
    version: int
    computed_at_ms: int
    expires_at_ms: int | None
    json: bytes
    cached: bool = False
    error: str | None = None
    unproven: bool = False

    def is_stale(self, newest_event: int) -> bool:
        """Whether the value was computed before `newest_event`, the sequence number of the user's newest event that
        invalidates the feature (0 if there is none)."""
        return max(self.version, 0) < newest_event


# One user's values by feature index.
Profile = dict[int, FeatureValue]


def not_computed(at_ms: int, reason: str) -> FeatureValue:
    """A null value for a feature that is disabled or paused, with the reason as its error."""
    return FeatureValue(b"", 0, at_ms, None, NULL, error=reason)


def failures(registry: Registry, profiles: Iterable[Profile]) -> dict[str, str]:
    """The first error of each feature that has one in any of the profiles, by feature name."""
    found: dict[str, str] = {}
    for profile in profiles:
        for index, value in profile.items():
            if value.error is not None:
                found.setdefault(registry.names[index], value.error)
    return found


def encode(value: FeatureValue) -> bytes:
    """Encode a value as the bytes that its key in the cache holds. The value must have an expiry."""
    return b"V%b:%d:%013d:%013d:%b" % (
        value.fingerprint,
        value.version,
        value.computed_at_ms,
        value.expires_at_ms or 0,
        value.json,
    )


def decode(held: bytes | None) -> FeatureValue | None:
    """Decode the bytes of a key; None for a lease, an empty key, or bytes that this service did not write."""
    if held is None or held[:1] != VALUE:
        return None
    parts = held[1:].split(b":", _PARTS - 1)
    if len(parts) != _PARTS or not parts[4]:
        return None
    try:
        return FeatureValue(parts[0], int(parts[1]), int(parts[2]), int(parts[3]), parts[4], cached=True)
    except ValueError:
        return None


class ReadTime(NamedTuple):
    """The time by this process's clock, as 13 digits, for comparison with the times in cached values. `latest` is
    `CLOCK_SKEW_MS` after `now`: a value that was computed later is no hit."""

    now: bytes
    latest: bytes


def read_time(now_ms: int) -> ReadTime:
    return ReadTime(b"%013d" % now_ms, b"%013d" % (now_ms + CLOCK_SKEW_MS))


class FeatureMask:
    """A bit mask of features, compiled for decoding the cached values of these features quickly.

    A regular expression matches the contents of many keys at once, joined by NUL, which JSON text cannot contain. It
    captures the times and the JSON of each value. The times are compared as bytes.
    """

    __slots__ = ("_find", "_match", "features", "indices", "width")

    def __init__(self, registry: Registry, mask: int) -> None:
        self.indices = tuple(indices(mask))
        self.features = tuple(registry.names[index].encode() for index in self.indices)
        self.width = len(self.indices)
        fingerprints = [re.escape(registry[index].fingerprint.encode()) for index in self.indices]
        value = rb"V%b:-?[0-9]{1,19}+:([0-9]{13}):([0-9]{13}):([^\0]++)"  # \d would be slower
        user = b"\0".join([value % fingerprint for fingerprint in fingerprints])
        self._match = re.compile(user).fullmatch
        self._find = re.compile(rb"(?<![^\0])%b\0" % user).findall

    def values(self, held: Sequence[bytes | None], at: ReadTime) -> Sequence[bytes] | None:
        """The JSON of each feature, given the contents of a user's keys; None unless all are hits."""
        if None in held:
            return None
        found = self._match(b"\0".join(held))  # type: ignore[arg-type]  # there is no None
        if found is None:
            return None
        parts = found.groups()
        return parts[2::3] if max(parts[::3]) <= at.latest and at.now < min(parts[1::3]) else None

    def rows(self, held: Sequence[bytes | None], at: ReadTime) -> Sequence[Sequence[bytes]] | None:
        """The JSON of each feature for several users, one row per user; None unless all are hits. `held` has the
        contents of the users' keys, user by user."""
        if None in held:
            return None
        contents = b"\0".join(held) + b"\0"  # type: ignore[arg-type]  # there is no None
        found = self._find(contents)
        # Each match ends `width` keys. So if no key has a NUL of its own, the matches cover all contents.
        if len(found) * self.width != len(held) or contents.count(b"\0") != len(held):
            return None
        parts = list(zip(*found, strict=True))
        if max(map(max, parts[::3])) > at.latest or min(map(min, parts[1::3])) <= at.now:
            return None
        return list(zip(*parts[2::3], strict=True))


class Filler:
    """Reads keys before a computation, and stores the computed values in those that have not changed since."""

    def __init__(self, cache: Cache, registry: Registry, metrics: Metrics) -> None:
        self.cache = cache
        self._names = registry.names
        self._metrics = metrics
        self._masks = [FeatureMask(registry, 1 << index) for index in range(len(registry))]
        self._later: list[tuple[Epoch, Mapping[str, Mapping[int, bytes]], Mapping[str, Profile]]] = []
        self._storing: set[asyncio.Task[None]] = set()

    def hit(self, index: int, held: bytes | None, at: ReadTime) -> FeatureValue | None:
        """Decode the contents of a key. None unless a read may serve the value: it must have been computed with this
        process's definition of the feature and must not have expired."""
        if held is None or held[:1] != VALUE:  # an empty key or a lease, without the cost of a match
            return None
        return decode(held) if self._masks[index].values([held], at) is not None else None

    async def read(self, wanted: Mapping[str, int]) -> tuple[Epoch, dict[str, dict[int, bytes | None]]]:
        """Read the contents of keys; `wanted` maps user ids to masks of features. Return the epoch of the keys, and the
        contents by user id and feature index. Raises `CacheUnavailable`."""
        cells = [Cell(user_id, self._names[index]) for user_id, mask in wanted.items() for index in indices(mask)]
        epoch, raws = await self.cache.read(cells)
        held = iter(raws)
        return epoch, {user_id: {index: next(held) for index in indices(mask)} for user_id, mask in wanted.items()}

    async def tokens(self, epoch: Epoch, held: Mapping[str, Mapping[int, bytes | None]]) -> dict[str, dict[int, bytes]]:
        """Take a token for each key, by user id and feature index: the bytes that the key must still hold when a value
        is stored.

        `held` has the contents of each key, which are the token. If the key was empty (None), the token is a new lease.
        If another reader has meanwhile written a lease or a value into the empty key, the token is what that reader
        wrote.
        """
        empty = [
            Cell(user_id, self._names[index])
            for user_id, cells in held.items()
            for index, raw in cells.items()
            if raw is None
        ]
        leased = iter(await self.cache.lease(epoch, empty))
        return {
            user_id: {index: next(leased) if raw is None else raw for index, raw in cells.items()}
            for user_id, cells in held.items()
        }

    def fills(self, tokens: Mapping[str, Mapping[int, bytes]], profiles: Mapping[str, Profile]) -> list[Fill]:
        """The compare-and-set operations that store computed values: one for each value with a token and an expiry."""
        fills: list[Fill] = []
        for user_id, of_user in tokens.items():
            for index, token in of_user.items():
                value = profiles[user_id][index]
                if value.expires_at_ms is not None:
                    ttl_ms = value.expires_at_ms - value.computed_at_ms
                    fills.append(Fill(Cell(user_id, self._names[index]), token, encode(value), ttl_ms))
        return fills

    def store_later(
        self, epoch: Epoch, tokens: Mapping[str, Mapping[int, bytes]], profiles: Mapping[str, Profile]
    ) -> None:
        """Store computed values in the cache in the background, after `FILL_AFTER_S` seconds."""
        self._later.append((epoch, tokens, profiles))
        if len(self._later) == 1:
            task = asyncio.get_running_loop().create_task(self._store_later())
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)

    async def close(self) -> None:
        """Wait until no value is being stored in the background."""
        while self._storing:
            await asyncio.gather(*self._storing, return_exceptions=True)

    async def _store_later(self) -> None:
        try:
            await asyncio.sleep(FILL_AFTER_S)
        finally:
            later, self._later = self._later, []
        fills: dict[Epoch, list[Fill]] = {}
        for epoch, tokens, profiles in later:
            fills.setdefault(epoch, []).extend(self.fills(tokens, profiles))
        for epoch, of_epoch in fills.items():
            await self.store(epoch, of_epoch)

    async def store(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Store values by compare-and-set in one round trip; return whether each value was stored. If the cache fails,
        no value is stored; the failure is counted as a metric and not raised."""
        if not fills:
            return []
        try:
            landed = await self.cache.fill(epoch, fills)
        except CacheUnavailable:
            self._metrics.fills.labels("failed").inc(len(fills))
            return [False] * len(fills)
        stored = sum(landed)
        self._metrics.fills.labels("stored").inc(stored)
        self._metrics.fills.labels("refused").inc(len(fills) - stored)
        return landed


class TrustGate(msgspec.Struct, eq=False):
    """Decides whose cached values may be served: those of users in whose hash slot no invalidation is owed.

    An invalidation is owed if the DEL of stale keys could not be made; the database has a record of it. `check` repeats
    the query for such records if the last one is too old; it does not rely on a timer, which a busy event loop could
    delay. If the query takes a round trip, reads share it, and send their MGET meanwhile. `on_owed` is called if an
    invalidation is owed or the query fails. `replaced_slots` returns the hash slots in which keys of the first state
    are no longer read under the second.
    """

    state: ObservedState
    clock: Clock
    on_owed: Callable[[], None]
    replaced_slots: Callable[[State, State], frozenset[int]] = lambda *_: _EVERYONE
    _checked_at: float = float("-inf")
    _asked_at: float = float("-inf")
    _asking: asyncio.Task[State | None] | None = None
    _distrusted: frozenset[int] = _EVERYONE
    _owed: frozenset[int] = _EVERYONE  # by the last query that the database answered
    _answered: bool = False

    def check(self) -> frozenset[int] | PendingCheck:
        """The hash slots of the users whose cached values must not be served by a read that begins now. If that takes a
        query with a round trip, return the running query: the read may ask the cache meanwhile, but must await it
        before it serves a hit. `EVERY_SLOT` is among the slots if the database does not answer."""
        now = self.clock.monotonic()
        if 0 <= now - self._checked_at <= CHECK_VALID_S:
            return self._distrusted
        if self._asking is None or self._asking.done() or not 0 <= now - self._asked_at <= CHECK_VALID_S:
            try:
                state = self.state.look()
            except StoreUnavailable:
                return self._note(now, None)
            if state is not None:
                return self._note(now, state)
            self._asked_at = now
            self._asking = asyncio.get_running_loop().create_task(self._ask(now))
        return PendingCheck(self._asking, self.state.last, self.replaced_slots)

    async def distrusted(self) -> frozenset[int]:
        """The result of `check`, after its query."""
        check = self.check()
        return check if isinstance(check, frozenset) else await check.distrusted()

    async def allows_unproven(self) -> bool:
        """Whether reads may serve cached values that could be stale: the database does not answer now, and no
        invalidation was owed when it last answered."""
        await self.distrusted()
        return not self._answered and not self._owed

    async def _ask(self, at: float) -> State | None:
        try:
            state = await self.state.query()
        except StoreUnavailable:
            self._note(at, None)
            return None
        self._note(at, state)
        return state

    def _note(self, at: float, state: State | None) -> frozenset[int]:
        """Record the result of a query that began at `at` or later; `state` is None if the database did not answer.
        Return the hash slots of the users whose cached values must not be served."""
        self._checked_at = at
        self._answered = state is not None
        if state is not None:
            self._owed = state.owed
        self._distrusted = self._owed if state is not None else _EVERYONE
        if self._distrusted:
            self.on_owed()
        return self._distrusted


class PendingCheck(NamedTuple):
    """A running query for the registered cache server and the owed invalidations. `before` is the result of the
    previous query. Reads that send their MGET before the query is answered use the keys of `before`."""

    asking: asyncio.Task[State | None]
    before: State
    replaced_slots: Callable[[State, State], frozenset[int]]

    async def distrusted(self) -> frozenset[int]:
        """Await the query; return the hash slots of users whose cached values, read meanwhile, must not be served."""
        state = await asyncio.shield(self.asking)
        if state is None:
            return _EVERYONE
        return state.owed if state.has_keys_of(self.before) else state.owed | self.replaced_slots(self.before, state)
