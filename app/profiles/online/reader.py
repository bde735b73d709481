"""Reads profiles: hits come from the cache, misses are computed and stored in it.

Reads of values (`read_values`, `read_recorded`) try the local cache of the process first. All other reads are batched
(`app.profiles.online.request_batching`). If the cache is unavailable, everything is computed. Invariant: except by
`read_unproven`, a hit is served only while no invalidation is owed in the user's hash slot (see `TrustGate`).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec

from app.concurrency.overload import OverloadQueue
from app.errors import CacheUnavailable, Overloaded
from app.features.ids import hash_slot
from app.features.registry import ProfileRead, Scalar, ValueRead, indices
from app.profiles.online.cache_protocol import LAST_EXPIRY_MS, NULL, FeatureValue, Profile, ReadTime, not_computed
from app.profiles.online.local_cache import KeptProfile, LocalCache
from app.profiles.online.request_batching import GROUP_CAP, RequestBatching, Wanted
from app.profiles.ports import EVERY_SLOT, ComputeRow

WAIT_S = 1.0  # in the overload queue, before the cache's server is asked

_decode = msgspec.json.Decoder(Scalar).decode


class ProfileReader(RequestBatching, kw_only=True, eq=False, dict=True):
    overload_queue: OverloadQueue = msgspec.field(default_factory=lambda: OverloadQueue(WAIT_S))

    async def read(self, wanted: Wanted, *, patient: bool = False) -> dict[str, Profile]:
        """Read profiles, given a mask for each user id. They reflect every event that was acknowledged before the call.
        A `patient` read is never shed.

        Raises:
            StoreUnavailable: values must be computed and the database does not answer.
            Overloaded: values must be computed and the read is shed.
        """
        off = self.computation.availability.disabled
        if not off:
            return await self._batched(wanted, plain=False, patient=patient)
        nulls = self._nulls()  # before the read, during which a feature may be enabled
        found = await self._batched(_without(wanted, off), plain=False, patient=patient)
        return {
            user_id: found.get(user_id, {}) | {index: nulls[index] for index in indices(mask & off)}
            for user_id, mask in wanted.items()
        }

    async def read_values(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        """Read values as JSON, by user id. The local cache is asked first. Raises the errors of `read`."""
        off = self.computation.availability.disabled
        asked = _without(wanted, off) if off else wanted
        found = self._local_hits(asked)
        if len(found) < len(asked):
            missing = {user_id: mask for user_id, mask in asked.items() if user_id not in found}
            found |= await self._batched(missing, plain=True)
        return _all_with_nulls(found, wanted, off) if off else found

    async def read_shared_values(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        """Read values as `read_values` does, without the local cache."""
        off = self.computation.availability.disabled
        if not off:
            return await self._batched(wanted, plain=True)
        return _all_with_nulls(await self._batched(_without(wanted, off), plain=True), wanted, off)

    async def read_unproven(self, wanted: Wanted, max_age_s: int) -> dict[str, Profile] | None:
        """Read cached profiles while the database does not answer, so that nothing proves that they are current.

        Each value was computed at most `max_age_s` seconds ago and has not expired. It may lack an event that was
        acknowledged since: the DEL may have failed, or may have gone to another server, if the cache was replaced.
        Returns None if a value is missing, the cache is unavailable, the database answers, or an invalidation was owed
        when it last answered.
        """
        if not await self.gate.allows_unproven() or not self.cache.available:
            return None
        nulls = self._nulls()
        profiles = {user_id: {i: nulls[i] for i in indices(mask) if i in nulls} for user_id, mask in wanted.items()}
        asked = _without(wanted, sum(1 << index for index in nulls))
        try:
            held = (await self.filler.read(asked))[1] if asked else {}
        except CacheUnavailable:
            return None
        now_ms = self.computation.clock.now_ms()
        at, oldest_ms = ReadTime.of(now_ms), now_ms - max_age_s * 1000
        for user_id, index, raw in ((user_id, *item) for user_id, cells in held.items() for item in cells.items()):
            value = self.filler.hit(index, raw, at)
            if value is None or value.computed_at_ms < oldest_ms:
                return None
            profiles[user_id][index] = value._replace(unproven=True)
        self.computation.metrics.unproven_reads.inc(len(profiles))
        return profiles

    async def read_features(self, user_id: str, mask: int) -> dict[str, Scalar]:
        """Read one user's values by feature name. Raises the errors of `read`."""
        values = (await self.read_values({user_id: mask}))[user_id]
        names = self.computation.registry.names
        return {names[index]: _decode(value) for index, value in zip(indices(mask), values, strict=True)}

    async def read_recorded(self, user_id: str) -> tuple[dict[str, Scalar], ProfileRead]:
        """Read one user's values by feature name. The `ProfileRead` has the version of each, and one moment at which
        all of them were valid. Raises the errors of `read`."""
        wanted = {user_id: self.computation.registry.full_mask}
        recorded = self._recorded(self._local_profile(user_id) or (await self.read(wanted))[user_id])
        if recorded is None:
            # A value expired while another one was computed, or the clocks of two processes differ.
            recorded = self._recorded((await self.computation.live(wanted))[user_id])
            assert recorded is not None  # one statement has one moment
        return recorded

    def _recorded(self, profile: Profile) -> tuple[dict[str, Scalar], ProfileRead] | None:
        """The values by feature name, and how they were read; None if there was no moment at which all were valid."""
        features: dict[str, Scalar] = {}
        read: dict[str, ValueRead] = {}
        first_ms, last_ms = 0, LAST_EXPIRY_MS
        for index, entry in enumerate(self.computation.registry):
            value = profile[index]
            features[entry.name] = _decode(value.json)
            if value.error is None:
                read[entry.name] = ValueRead(entry.fingerprint, value.version)
                first_ms = max(first_ms, value.computed_at_ms)
                # Without an expiry, a value is certain only for the moment of its computation.
                last_ms = min(last_ms, value.computed_at_ms if value.expires_at_ms is None else value.expires_at_ms - 1)
        # Now, unless a value has expired since it was read, or its process's clock is ahead.
        at_ms = min(max(self.computation.clock.now_ms(), first_ms), last_ms)
        return (features, ProfileRead(at_ms, read)) if first_ms <= last_ms else None

    def local_values(self, user_id: str, mask: int) -> Sequence[bytes] | None:
        """One user's values, as `read_values` returns them, if the local cache has them; else None."""
        off = mask & self.computation.availability.disabled
        if off == mask:
            return [NULL] * mask.bit_count()
        kept = self._local_hit(user_id, mask & ~off)
        if kept is None:
            return None
        return _with_nulls(kept.values, mask, off) if off else kept.values

    async def read_as_of(self, asked: list[ComputeRow]) -> list[Profile]:
        """Compute profiles as of past moments; see `Computation.moments`. Raises `Overloaded` if the read is shed."""
        overloaded = self.computation.history_overloaded
        if overloaded(len(asked)) and (not await self.overload_queue.wait() or overloaded(len(asked))):
            raise Overloaded("history")
        return await self.computation.moments(asked)

    async def close(self) -> None:
        await self.overload_queue.close()
        await super().close()
        await self.computation.close()

    async def _batched(self, wanted: Wanted, *, plain: bool, patient: bool = False) -> dict[str, Any]:
        if not wanted:  # only disabled features
            return {}
        # After the overload queue, a read asks the cache. Misses are computed if there is capacity by then.
        if self.computation.overloaded and not patient and not await self.overload_queue.wait():
            raise Overloaded("reads")
        if len(wanted) <= GROUP_CAP:
            return await self.submit(wanted, plain=plain, patient=patient)
        answer: dict[str, Any] = {}
        pairs = iter(wanted.items())
        while piece := dict(islice(pairs, GROUP_CAP)):
            answer.update(await self.submit(piece, plain=plain, patient=patient or bool(answer)))
        return answer

    def _local_hits(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        local_cache, distrusted = self._trusted_local_cache()
        if local_cache is None:
            return {}
        if distrusted:
            wanted = {user_id: mask for user_id, mask in wanted.items() if hash_slot(user_id) not in distrusted}
        found = local_cache.find_all(wanted, self.computation.clock.now_ms())
        self._count_local(sum(map(len, found.values())))
        return found

    def _local_hit(self, user_id: str, mask: int) -> KeptProfile | None:
        local_cache, distrusted = self._trusted_local_cache()
        if local_cache is None or (distrusted and hash_slot(user_id) in distrusted):
            return None
        kept = local_cache.find(user_id, mask, self.computation.clock.now_ms())
        if kept is not None:
            self._count_local(len(kept.values))
        return kept

    def _local_profile(self, user_id: str) -> Profile | None:
        """The profile with all features from the local cache, or None. The local cache has only one computation time
        and one expiry per profile, so each value gets these two."""
        mask = self.computation.registry.full_mask & ~self.computation.availability.disabled
        profile = self._nulls()
        kept = self._local_hit(user_id, mask)
        if kept is None:
            return None
        for index, version, json in zip(indices(mask), kept.versions, kept.values, strict=True):
            profile[index] = FeatureValue(b"", version, kept.computed_at_ms, kept.expires_at_ms, json, cached=True)
        return profile

    def _nulls(self) -> Profile:
        """A null value, with the reason, for each feature that is disabled now."""
        disabled = self.computation.availability.disabled_features()
        return {index: not_computed(item.at_ms, str(item)) for index, item in disabled.items()}

    def _trusted_local_cache(self) -> tuple[LocalCache | None, frozenset[int]]:
        """The local cache if its hits may be served, and the hash slots of the users whose hits must not be served."""
        # One rule for all hits: if hits from the server would not be served, local ones are not served either.
        if self.local_cache is not None and self.cache.available:
            distrusted = self.gate.check()
            if isinstance(distrusted, frozenset) and EVERY_SLOT not in distrusted:
                return self.local_cache, distrusted
        return None, frozenset()

    def _count_local(self, values: int) -> None:
        self.computation.metrics.cache_hits.inc(values)
        self.computation.metrics.near_hits.inc(values)


def _without(wanted: Wanted, off: int) -> dict[str, int]:
    """Remove the disabled features `off` from the masks, and leave out users with no other feature."""
    return {user_id: mask & ~off for user_id, mask in wanted.items() if mask & ~off}


def _all_with_nulls(found: dict[str, Sequence[bytes]], wanted: Wanted, off: int) -> dict[str, Sequence[bytes]]:
    return {user_id: _with_nulls(found.get(user_id, ()), mask, off) for user_id, mask in wanted.items()}


def _with_nulls(values: Sequence[bytes], mask: int, off: int) -> Sequence[bytes]:
    """Insert a null for each disabled feature into the values of the other features of the mask."""
    read = iter(values)
    return [NULL if off >> index & 1 else next(read) for index in indices(mask)]
