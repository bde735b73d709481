"""Rebuilding: compute again and replace, while readers stay on the held values.

The held value is the token (its bytes carry its sequence number), so no reader misses meanwhile, and an event that
comes in between makes the fill refuse, as everywhere. A refused fill is tried again with a fresh token and a fresh
snapshot. Invariants: a rebuilt value that landed was computed after the rebuild began; where none landed, because
events kept coming or the cache takes nothing in, nothing older is left there either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from app.errors import CacheUnavailable
from app.features.registry import Registry, indices
from app.profiles.online.compute import Computation
from app.profiles.online.fill import Filler, Filling, Missing, Profile
from app.profiles.online.invalidation import Stale
from app.profiles.ports import Cache
from app.telemetry import logger

ATTEMPTS = 3
# A longer statement holds a core for longer than the system's scheduler lets others wait: with 128 users the p99 of
# reads beside it was about twice as long, and the rebuild a tenth faster.
USERS_AT_ONCE = 16
log = logger("profiles.rebuild")


class Rebuilder:
    """Refreshes users' features now."""

    def __init__(
        self,
        *,
        cache: Cache,
        computation: Computation,
        filler: Filler,
        registry: Registry,
        invalidate: Callable[[Stale], Awaitable[bool]],
    ) -> None:
        """`invalidate`: as `Invalidator.invalidate`."""
        self._cache = cache
        self._computation = computation
        self._filler = filler
        self._registry = registry
        self._invalidate = invalidate

    @property
    def keeps(self) -> bool:
        """Whether the cache is there to keep what is rebuilt."""
        return self._cache.available

    async def rebuild(self, user_ids: Sequence[str], mask: int) -> dict[str, Profile]:
        """Compute and cache the features in `mask` for each user; returns when the fills have been answered.

        A cache that is away is no error: the values are computed and returned, and what it may hold is invalidated.
        Raises `StoreUnavailable`.
        """
        results: dict[str, Profile] = {}
        left: dict[str, int] = {}
        for start in range(0, len(user_ids), USERS_AT_ONCE):
            left |= await self._rebuild(dict.fromkeys(user_ids[start : start + USERS_AT_ONCE], mask), results)
        if left:
            log.info("rebuild_not_kept", users=len(left), detail="the next read computes")
            names = self._registry.names
            await self._invalidate({user: [names[index] for index in indices(mask)] for user, mask in left.items()})
        return results

    async def _rebuild(self, wanted: dict[str, int], results: dict[str, Profile]) -> dict[str, int]:
        """Try some times; what did not land is returned."""
        for _ in range(ATTEMPTS):
            wanted = await self._attempt(wanted, results)
            if not wanted or not self.keeps:
                break
        return wanted

    async def _attempt(self, wanted: Mapping[str, int], results: dict[str, Profile]) -> dict[str, int]:
        """One pass; returns what did not land."""
        places = [(user_id, index) for user_id, mask in wanted.items() for index in indices(mask)]
        tokens: list[bytes] = []
        epoch = ""
        try:
            if not self._cache.available:
                raise CacheUnavailable("no cache is set, or it did not answer a moment ago")
            epoch, held = await self._cache.read([self._filler.cell(*place) for place in places])
            missing = [Missing(user_id, index, raw) for (user_id, index), raw in zip(places, held, strict=True)]
            tokens = await self._filler.tokens(epoch, missing)
        except CacheUnavailable:
            tokens = []
        token_of = dict(zip(places, tokens, strict=True)) if tokens else {}
        fillings: list[Filling] = []
        for user_id, one in (await self._computation.live(wanted)).items():
            profile = results.setdefault(user_id, {})
            for index in indices(wanted[user_id]):
                profile[index] = self._filler.reading(index, one.outcomes[index], one.at_ms)
                if not token_of:
                    profile[index] = profile[index]._replace(expires_at_ms=None)  # nothing keeps it
                else:
                    fillings.append(Filling(user_id, index, token_of[user_id, index], one.seq, profile[index]))
        if not token_of:
            return dict(wanted)
        refused: dict[str, int] = {}
        for filling, stored in zip(fillings, await self._filler.store(epoch, fillings), strict=True):
            if not stored and filling.reading.error is None:
                refused[filling.user_id] = refused.get(filling.user_id, 0) | 1 << filling.feature
        return refused
