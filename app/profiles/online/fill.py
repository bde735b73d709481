"""Tokens and fills: how a computed value may enter the cache (steps 2 and 4 of the protocol).

Invariant: every fill carries a token that was taken before the read of SQLite that computed it. Since each
invalidation deletes the key after its commit, a token that survived proves that no event came in between. Interleavings
this excludes, R a reader, E an event's ingest:
  1. R token, R snapshot, E commit, E DEL, R fill       the token is gone: refused
  2. R token, E commit, R snapshot, E DEL, R fill       refused, though the value was right: harmless
  3. R token, R snapshot, E commit, R fill, E DEL       the fill lands and the DEL removes it
  4. R1 token, R1 snapshot, E commit, E DEL, R2 token, R1 fill     R2's lease has another nonce: refused
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

from app.errors import CacheUnavailable
from app.features.registry import Feature, Registry
from app.profiles.codec import Value, decode, encode, hits
from app.profiles.online.compute import ComputedValue
from app.profiles.ports import Cache, Cell, Epoch, Fill
from app.telemetry import Metrics

TTL_JITTER = 0.1
# A fill waits for so long: the answers that it was computed for go out first, and several fills share a write.
FILL_AFTER_S = 0.002


class Reading(NamedTuple):
    """One feature as answered. `expires_at_ms` is None where the value is not meant for the cache."""

    json: bytes
    computed_at_ms: int
    expires_at_ms: int | None
    cached: bool
    error: str | None = None


Profile = dict[int, Reading]


def failures(registry: Registry, profiles: Iterable[Profile]) -> dict[str, str]:
    """Why features are null although something may be known: by name, the first reason of each."""
    found: dict[str, str] = {}
    for profile in profiles:
        for index, reading in profile.items():
            if reading.error is not None:
                found.setdefault(registry.names[index], reading.error)
    return found


class Missing(NamedTuple):
    """A cell that gave no hit: whose, which feature (its index), and the bytes the key held."""

    user_id: str
    feature: int
    held: bytes | None


class Filling(NamedTuple):
    """A computed reading on its way into the cache: under the token taken before its snapshot, which saw `seq`."""

    user_id: str
    feature: int
    token: bytes
    seq: int
    reading: Reading


class Filler:
    """Takes tokens and stores what was computed."""

    def __init__(self, cache: Cache, registry: Registry, random: Random, metrics: Metrics) -> None:
        self._cache = cache
        self._registry = registry
        self._random = random
        self._metrics = metrics
        self._fingerprints = [entry.fingerprint.encode() for entry in registry]
        self._hits = [hits([fingerprint]) for fingerprint in self._fingerprints]
        self._later: list[tuple[Epoch, Sequence[Filling]]] = []
        self._storing: set[asyncio.Task[None]] = set()

    def cell(self, user_id: str, index: int) -> Cell:
        """The cell of a user's feature."""
        return Cell(user_id, self._registry.names[index])

    def hit(self, index: int, held: bytes | None) -> Reading | None:
        """The held bytes as a reading, where they are a value under this process's fingerprint."""
        if held is None or self._hits[index]([held]) is None or (value := decode(held)) is None:
            return None
        return Reading(value.json, value.computed_at_ms, value.expires_at_ms, True)

    async def tokens(self, epoch: Epoch, missing: Sequence[Missing]) -> list[bytes]:
        """A token per missing cell: what it holds, or a lease of ours where it held nothing.

        A cell that got a value since is reported by that value's bytes; ask `hit` again.
        """
        empty = [(place, item) for place, item in enumerate(missing) if item.held is None]
        leased = await self._cache.lease(epoch, [self.cell(item.user_id, item.feature) for _, item in empty])
        tokens = [item.held or b"" for item in missing]
        for (place, _), token in zip(empty, leased, strict=True):
            tokens[place] = token
        return tokens

    def reading(self, index: int, outcome: ComputedValue, at_ms: int) -> Reading:
        """A computed value as answered, with the moment it will expire; with jitter, never beyond the TTL."""
        if outcome.error is not None:
            return Reading(outcome.json, at_ms, None, False, outcome.error)
        return Reading(outcome.json, at_ms, at_ms + self._ttl_ms(self._registry[index]), False)

    def store_later(self, epoch: Epoch, fillings: Sequence[Filling]) -> None:
        """`store` in the background, after `FILL_AFTER_S`."""
        self._later.append((epoch, fillings))
        if len(self._later) == 1:
            task = asyncio.get_running_loop().create_task(self._store_later())
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)

    async def close(self) -> None:
        """Finish the fills in the background."""
        while self._storing:
            await asyncio.gather(*self._storing, return_exceptions=True)

    async def _store_later(self) -> None:
        try:
            await asyncio.sleep(FILL_AFTER_S)
        finally:
            later, self._later = self._later, []
        for epoch in {epoch for epoch, _ in later}:
            await self.store(epoch, [filling for own, fillings in later if own == epoch for filling in fillings])

    async def store(self, epoch: Epoch, fillings: Sequence[Filling]) -> list[bool]:
        """Compare-and-set computed readings, in one round trip.

        Returns whether each landed. A reading with an error, or without an expiry, is never stored. A cache that
        fails stores nothing; that is counted, not raised.
        """
        fills = [fill for filling in fillings if (fill := self._fill(filling)) is not None]
        try:
            landed = await self._cache.fill(epoch, fills) if fills else []
        except CacheUnavailable:
            self._metrics.fills.labels("failed").inc(len(fills))
            return [False] * len(fillings)
        stored = sum(landed)
        self._metrics.fills.labels("stored").inc(stored)
        self._metrics.fills.labels("refused").inc(len(fills) - stored)
        outcomes = iter(landed)
        return [filling.reading.expires_at_ms is not None and next(outcomes) for filling in fillings]

    def _fill(self, filling: Filling) -> Fill | None:
        reading = filling.reading
        if reading.expires_at_ms is None:
            return None
        fingerprint = self._fingerprints[filling.feature]
        value = Value(fingerprint, filling.seq, reading.computed_at_ms, reading.expires_at_ms, reading.json)
        ttl_ms = reading.expires_at_ms - reading.computed_at_ms
        return Fill(self.cell(filling.user_id, filling.feature), filling.token, encode(value), ttl_ms)

    def _ttl_ms(self, entry: Feature) -> int:
        return max(1, int(entry.ttl_ms * (1 - TTL_JITTER * self._random.random())))
