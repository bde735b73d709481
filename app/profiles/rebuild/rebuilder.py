"""Rebuilds cached values: computes them again and replaces them, while readers keep hitting the old ones.

The token of a fill is the old cached value, which stays in the cache until the fill. If an event deletes the old value,
the fill is refused, and the rebuild tries again with a fresh token and snapshot. Invariants: a rebuilt value that was
stored was computed after the rebuild began. If a value could not be stored, because events kept coming or the cache is
unavailable, the old value is invalidated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from app.errors import CacheUnavailable
from app.features.registry import indices
from app.profiles.online.cache_protocol import Filler, Profile
from app.profiles.online.compute import Computation
from app.profiles.online.invalidation import Stale
from app.profiles.ports import Epoch
from app.telemetry import logger

ATTEMPTS = 3
# A larger statement holds a core for longer than the scheduler's time slice: with 128 users, the p99 of concurrent
# reads was about twice as long and the rebuild a tenth faster.
USERS_AT_ONCE = 16
log = logger("profiles.rebuild")


class Rebuilder(msgspec.Struct, kw_only=True, eq=False):
    """Computes features of users again and replaces their cached values. `invalidate` deletes cached values; see
    `Invalidator.invalidate`."""

    computation: Computation
    filler: Filler
    invalidate: Callable[[Stale], Awaitable[bool]]

    @property
    def keeps(self) -> bool:
        """Whether the cache is available, so that rebuilt values can be stored."""
        return self.filler.cache.available

    async def rebuild(self, user_ids: Sequence[str], mask: int) -> dict[str, Profile]:
        """Compute the features in `mask` for each user, store them in the cache, and return the profiles.

        If values cannot be stored, the old cached values are invalidated. Raises `StoreUnavailable`.
        """
        profiles: dict[str, Profile] = {}
        left: dict[str, int] = {}
        for start in range(0, len(user_ids), USERS_AT_ONCE):
            wanted = dict.fromkeys(user_ids[start : start + USERS_AT_ONCE], mask)
            for _ in range(ATTEMPTS):
                wanted = await self._attempt(wanted, profiles)
                if not wanted or not self.keeps:
                    break
            left |= wanted
        if left:
            log.info("rebuild_not_kept", users=len(left), detail="the next read computes")
            names = self.computation.registry.names
            await self.invalidate({user: [names[index] for index in indices(mask)] for user, mask in left.items()})
        return profiles

    async def _attempt(self, wanted: Mapping[str, int], profiles: dict[str, Profile]) -> dict[str, int]:
        """Compute values into `profiles` and try once to store them. Return the masks of the features whose values were
        not stored, by user id."""
        epoch, tokens = await self._tokens(wanted)
        computed = await self.computation.live(wanted)
        for user_id, mask in wanted.items():
            profile = profiles.setdefault(user_id, {})
            for index in indices(mask):
                value = computed[user_id][index]
                profile[index] = value if tokens else value._replace(expires_at_ms=None)
        if not tokens:
            return dict(wanted)
        fills = self.filler.fills(tokens, profiles)
        refused: dict[str, int] = {}
        for fill, landed in zip(fills, await self.filler.store(epoch, fills), strict=True):
            if not landed:
                user_id, feature = fill.cell
                refused[user_id] = refused.get(user_id, 0) | self.computation.registry.mask([feature])
        return refused

    async def _tokens(self, wanted: Mapping[str, int]) -> tuple[Epoch, dict[str, dict[int, bytes]]]:
        """The epoch, and the token of each key by user id and feature index: the bytes that the key must still hold
        when the rebuilt value is stored. No tokens if the cache is unavailable."""
        if not self.keeps:
            return "", {}
        try:
            epoch, held = await self.filler.read(wanted)
            return epoch, await self.filler.tokens(epoch, held)
        except CacheUnavailable:
            return "", {}
