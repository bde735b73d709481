"""The cache protocol: the content of keys, when a hit may be served, and how a computed value enters the cache.

A key holds a value `V…` or a lease `L…`, as bytes:

    V<fingerprint>:<version>:<computed_ms>:<expires_ms>:<JSON>      L<nonce>

The version of a value is the sequence number of the user's newest event in the snapshot that the value was computed
from. Sequence numbers are never reused, so a value is stale if and only if its version is lower than the number of an
event that invalidates the value. If the user has no event, the version is minus the number of erasures so far, so that
no version repeats when the user is erased. The JSON comes last and verbatim, so a hit is answered without decoding.

A reader that finds an empty key writes a lease, a random nonce, before it reads the database. The bytes that the key
then holds, a lease or a value, are the reader's *token*: a computed value is stored by compare-and-set, only if the key
still holds the token. Values with equal bytes were computed from the same events at the same time.

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
an event invalidates the value. It expires when its TTL is over, or when the oldest event leaves the feature's window,
whichever comes first. A value is a hit only while this process's clock is between the two times; `computed_ms` may lie
up to `CLOCK_SKEW_MS` ahead, as the clock of another process may be.

Invariant of hits: an invalidation is *owed* if the DEL failed; the request that needs the DEL records this in the
database, and is answered `HOLD_BACK_S` later. A read serves a user's hits only if a query for owed invalidations began
at most `CHECK_VALID_S` before the read and found none in the user's hash slot (`TrustGate.check`). So when the request
is answered, no process serves hits by a query that ran before the record.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import msgspec

from app.errors import CacheUnavailable, StoreUnavailable
from app.features.clock import CLOCK_SKEW_MS, Clock
from app.features.registry import Registry, indices
from app.profiles.ports import EVERY_SLOT, Cache, Cell, Epoch, Fill, Held, ObservedState, State
from app.telemetry import Metrics

VALUE = b"V"
LEASE = b"L"
NULL = b"null"
# Times in values have 13 digits, so that they compare as bytes. This is the year 2286.
LAST_EXPIRY_MS = 9_999_999_999_999
# Fills are sent after this delay, so that the answers go out first and the fills of several misses share a write.
FILL_AFTER_S = 0.002
CHECK_VALID_S = 0.050
HOLD_BACK_S = 0.100
_EVERYONE = frozenset((EVERY_SLOT,))


class FeatureValue(NamedTuple):
    """One feature of one user, as cached, computed and answered; the first five fields are what a key holds.

    `version` is at most 0 if the computation saw no event. `expires_at_ms` is None if the value must not be cached. If
    the value could not be computed, `json` is null and `error` is the reason. `cached`: it came from the cache.
    `unproven`: it may be stale, because the database could not be asked.
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
        """Whether the value was computed before `newest_event`, the number of the user's newest event that invalidates
        the feature (0 if there is none)."""
        return max(self.version, 0) < newest_event


# One user's values by feature index.
Profile = dict[int, FeatureValue]
# By user id and feature index.
Tokens = dict[str, dict[int, bytes]]
# Awaits the answer of a query, and returns the hash slots of the users whose cached values must not be served.
PendingCheck = Callable[[], Awaitable[frozenset[int]]]


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
    """Encode a value, which must have an expiry, as the bytes that its key in the cache holds."""
    fingerprint, version, computed_at_ms, expires_at_ms, json = value[:5]
    return b"V%b:%d:%013d:%013d:%b" % (fingerprint, version, computed_at_ms, expires_at_ms or 0, json)


def decode(held: bytes | None) -> FeatureValue | None:
    """Decode the bytes of a key; None for a lease, an empty key, or bytes that this service did not write."""
    if held is None or held[:1] != VALUE:
        return None
    try:
        fingerprint, version, computed_ms, expires_ms, json = held[1:].split(b":", 4)
        value = FeatureValue(fingerprint, int(version), int(computed_ms), int(expires_ms), json, cached=True)
    except ValueError:
        return None
    return value if json else None


class ReadTime(NamedTuple):
    """The time now, and the latest time at which a hit may have been computed; in 13 digits, as in cached values."""

    now: bytes
    latest: bytes

    @classmethod
    def of(cls, now_ms: int) -> ReadTime:
        return cls(b"%013d" % now_ms, b"%013d" % (now_ms + CLOCK_SKEW_MS))


class FeatureMask:
    """A bit mask of features, compiled to decode their cached values quickly. A regular expression matches the contents
    of many keys at once, joined by NUL, which JSON text cannot contain. It captures the times and the JSON."""

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
        """The JSON of each feature for several users, one row per user; None unless all are hits."""
        if None in held:
            return None
        contents = b"\0".join(held) + b"\0"  # type: ignore[arg-type]  # there is no None
        found = self._find(contents)
        # Each match covers `width` keys, each with its NUL. With enough matches and no other NUL, all keys are covered.
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
        self._later: dict[Epoch, list[tuple[Tokens, Mapping[str, Profile]]]] = {}
        self._storing: set[asyncio.Task[None]] = set()

    def hit(self, index: int, held: bytes | None, at: ReadTime) -> FeatureValue | None:
        """The value that a key holds, or None if a read may not serve it: it has expired, or was computed with another
        definition of the feature `index`. `held`: the contents of the key."""
        if held is None or held[:1] != VALUE:  # an empty key or a lease, without the cost of a match
            return None
        return decode(held) if self._masks[index].values([held], at) is not None else None

    async def read(self, wanted: Mapping[str, int]) -> tuple[Epoch, Held]:
        """Read the keys of the features in each user's mask. Raises `CacheUnavailable`."""
        cells = [Cell(user_id, self._names[index]) for user_id, mask in wanted.items() for index in indices(mask)]
        epoch, raws = await self.cache.read(cells)
        held = iter(raws)
        return epoch, {user_id: {index: next(held) for index in indices(mask)} for user_id, mask in wanted.items()}

    async def tokens(self, epoch: Epoch, held: Held) -> Tokens:
        """Take a token for each key. The contents of the key are the token. If the key was empty, the token is a new
        lease, or what another reader has written into the key meanwhile."""
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

    def fills(self, tokens: Tokens, profiles: Mapping[str, Profile]) -> list[Fill]:
        """The operations that store computed values: one for each value with a token and an expiry."""
        fills: list[Fill] = []
        for user_id, of_user in tokens.items():
            for index, token in of_user.items():
                value = profiles[user_id][index]
                if value.expires_at_ms is not None:
                    ttl_ms = value.expires_at_ms - value.computed_at_ms
                    fills.append(Fill(Cell(user_id, self._names[index]), token, encode(value), ttl_ms))
        return fills

    def store_later(self, epoch: Epoch, tokens: Tokens, profiles: Mapping[str, Profile]) -> None:
        """Store computed values in the cache in the background, after `FILL_AFTER_S` seconds."""
        if not self._later:
            task = asyncio.get_running_loop().create_task(self._store_later())
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)
        self._later.setdefault(epoch, []).append((tokens, profiles))

    async def close(self) -> None:
        while self._storing:
            await asyncio.gather(*self._storing, return_exceptions=True)

    async def _store_later(self) -> None:
        try:
            await asyncio.sleep(FILL_AFTER_S)
        finally:
            later, self._later = self._later, {}
        for epoch, computed in later.items():
            await self.store(epoch, [fill for item in computed for fill in self.fills(*item)])

    async def store(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Store values in one round trip; return whether each was stored. If the cache fails, that is only counted."""
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

    `check` queries the database if the last query is too old; it does not rely on a timer, which a busy event loop
    could delay. If a query takes a round trip, reads share it, and send their MGET meanwhile. `on_owed` is called if an
    invalidation is owed or the query fails. `replaced_slots` returns the hash slots whose cache keys differ between
    two states.
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

    def check(self) -> frozenset[int] | PendingCheck:
        """The hash slots of the users whose cached values must not be served by a read that begins now; `EVERY_SLOT` is
        among them if the database does not answer. If the check must wait for a query, return a function that awaits
        it: the read may ask the cache meanwhile, but must call the function before it serves a hit."""
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
        return partial(self._answer, self._asking, self.state.last)

    async def distrusted(self) -> frozenset[int]:
        """The hash slots that `check` returns, after its query if it needs one."""
        check = self.check()
        return check if isinstance(check, frozenset) else await check()

    async def allows_unproven(self) -> bool:
        """Whether reads may serve cached values that could be stale: the database does not answer now, and no
        invalidation was owed when it last answered."""
        await self.distrusted()
        return bool(self._distrusted) and not self._owed

    async def _ask(self, at: float) -> State | None:
        state: State | None = None
        with suppress(StoreUnavailable):
            state = await self.state.query()
        self._note(at, state)
        return state

    async def _answer(self, asking: asyncio.Task[State | None], before: State) -> frozenset[int]:
        """Await a query; return the hash slots whose cached values must not be served. During the query, the read may
        ask the cache for keys of the state `before`. The hash slots whose keys differ in the new state are included."""
        state = await asyncio.shield(asking)
        if state is None:
            return _EVERYONE
        return state.owed if state.has_keys_of(before) else state.owed | self.replaced_slots(before, state)

    def _note(self, at: float, state: State | None) -> frozenset[int]:
        """Record the result of a query that began at `at` or later. `state` is None if the database did not answer.
        Return the hash slots of the users whose cached values must not be served."""
        self._checked_at = at
        if state is not None:
            self._owed = state.owed
        self._distrusted = self._owed if state is not None else _EVERYONE
        if self._distrusted:
            self.on_owed()
        return self._distrusted
