"""Rebuilding: compute again and replace, while readers stay on the held values.

The held value is the token (its bytes carry its sequence number), so no reader misses meanwhile, and an event that
comes in between makes the fill refuse, as everywhere. A refused fill is tried again with a fresh token and a fresh
snapshot. Invariant: a rebuilt value that landed was computed after the rebuild began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.errors import CacheUnavailable
from app.features.registry import Registry, indices
from app.profiles.computation import Computation
from app.profiles.filling import Filler, Filling, Missing, Profile, own_outcomes
from app.profiles.ports import Cache
from app.telemetry import logger

ATTEMPTS = 3
log = logger("profiles.rebuild")


class Rebuilder:
    """Refreshes users' features now."""

    def __init__(self, *, cache: Cache, computation: Computation, filler: Filler, registry: Registry) -> None:
        self._cache = cache
        self._computation = computation
        self._filler = filler
        self._registry = registry

    @property
    def keeps(self) -> bool:
        """Whether the cache is there to keep what is rebuilt."""
        return self._cache.available

    async def rebuild(self, user_ids: Sequence[str], mask: int) -> dict[str, Profile]:
        """Compute and cache the features in `mask` for each user; returns when the fills have been answered.

        A cache that is away is no error: the values are computed and returned, and nothing old can be served from
        it. Raises `StoreUnavailable`.
        """
        results: dict[str, Profile] = {}
        wanted = dict.fromkeys(user_ids, mask)
        for _ in range(ATTEMPTS):
            wanted = await self._attempt(wanted, results)
            if not wanted:
                break
        else:
            log.info("rebuild_outrun", users=len(wanted), detail="events kept coming; the next read computes")
        return results

    async def _attempt(self, wanted: Mapping[str, int], results: dict[str, Profile]) -> dict[str, int]:
        """One pass; returns what was refused and is worth another."""
        places = [(user_id, index) for user_id, mask in wanted.items() for index in indices(mask)]
        tokens: list[bytes] = []
        epoch = ""
        try:
            if not self._cache.available:
                raise CacheUnavailable("the circuit breaker is open")
            epoch, held = await self._cache.read([self._filler.cell(*place) for place in places])
            missing = [Missing(user_id, index, raw) for (user_id, index), raw in zip(places, held, strict=True)]
            tokens = await self._filler.tokens(epoch, missing)
        except CacheUnavailable:
            tokens = []
        token_of = dict(zip(places, tokens, strict=True)) if tokens else {}
        fillings: list[Filling] = []
        for part, user_id, outcomes in own_outcomes(await self._computation.live(wanted), wanted):
            profile = results.setdefault(user_id, {})
            for index in indices(wanted[user_id]):
                profile[index] = self._filler.reading(index, outcomes[index], part.at_ms)
                if not token_of:
                    profile[index] = profile[index]._replace(expires_at_ms=None)  # nothing keeps it
                else:
                    fillings.append(Filling(user_id, index, token_of[user_id, index], part.seq, profile[index]))
        refused: dict[str, int] = {}
        for filling, stored in zip(fillings, await self._filler.store(epoch, fillings), strict=True):
            if not stored and filling.reading.error is None:
                refused[filling.user_id] = refused.get(filling.user_id, 0) | 1 << filling.feature
        return refused
