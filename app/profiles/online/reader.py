"""Reading profiles: hits come from the cache, misses are computed and filled.

Plain reads try the local cache first (`app.profiles.online.local_cache`); the others are batched
(`app.profiles.online.request_batching`). If the cache is unavailable, everything is computed.
Invariant: a hit is served only while the trust gate holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec

from app.concurrency.overload_queue import OverloadQueue
from app.errors import Overloaded
from app.features.registry import Registry, Scalar, indices
from app.profiles.online.cache_protocol import NULL, FeatureMasks, Filler, Profile, TrustGate, not_computed
from app.profiles.online.compute import Computation
from app.profiles.online.local_cache import LocalCache
from app.profiles.online.request_batching import GROUP_CAP, RequestBatching, Wanted
from app.profiles.ports import Cache, ComputeRow
from app.telemetry import Metrics

WAIT_S = 1.0  # in the overload queue, before the cache's server is asked

_decode = msgspec.json.Decoder(Scalar).decode


class ProfileReader:
    """Reads features of users. One per process."""

    def __init__(
        self,
        *,
        cache: Cache,
        gate: TrustGate,
        computation: Computation,
        filler: Filler,
        registry: Registry,
        metrics: Metrics,
        near: LocalCache | None = None,
    ) -> None:
        """Without `near`, every hit comes from the cache's server."""
        self._cache = cache
        self._gate = gate
        self._near = near
        self._turns = OverloadQueue(WAIT_S)
        self._computation = computation
        self._availability = computation.availability
        self._metrics = metrics
        self._registry = registry
        self._batching = RequestBatching(
            cache=cache,
            gate=gate,
            computation=computation,
            filler=filler,
            shapes=FeatureMasks(registry),
            metrics=metrics,
            near=near,
        )

    async def read(self, wanted: Wanted, *, patient: bool = False) -> dict[str, Profile]:
        """Read each user's mask of features. The result reflects every event acknowledged before the call.

        A `patient` read is never shed.

        Raises:
            StoreUnavailable: values must be computed and the database does not answer.
            Overloaded: values must be computed and the read is shed.
        """
        off = self._availability.disabled
        if not off:
            return await self._in_pieces(wanted, plain=False, patient=patient)
        found = await self._in_pieces(_without(wanted, off), plain=False, patient=patient)
        nulls = {
            index: not_computed(item.at_ms, str(item)) for index, item in self._availability.disabled_features().items()
        }
        return {
            user_id: found.get(user_id, {}) | {index: nulls[index] for index in indices(mask & off)}
            for user_id, mask in wanted.items()
        }

    async def read_values(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        """As `read`, but returns only the JSON of each feature, in registry order."""
        off = self._availability.disabled
        if off:
            found = await self._read_values(_without(wanted, off))
            return {user_id: _with_nulls(found.get(user_id, ()), mask, off) for user_id, mask in wanted.items()}
        return await self._read_values(wanted)

    async def _read_values(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        near = self._near_hits(wanted)
        if len(near) == len(wanted):
            return near
        return near | await self._in_pieces(
            {user: mask for user, mask in wanted.items() if user not in near}, plain=True
        )

    async def read_far_values(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        """As `read_values`, for users that are known not to be in the local cache."""
        off = self._availability.disabled
        if off:
            found = await self._in_pieces(_without(wanted, off), plain=True)
            return {user_id: _with_nulls(found.get(user_id, ()), mask, off) for user_id, mask in wanted.items()}
        return await self._in_pieces(wanted, plain=True)

    async def read_features(self, user_id: str, mask: int | None = None) -> dict[str, Scalar]:
        """One user's values by feature name; all features without a mask. Raises as `read`."""
        if mask is None:
            mask = self._registry.full_mask
        values = self.near_values(user_id, mask) or (await self.read_far_values({user_id: mask}))[user_id]
        names = self._registry.names
        return {names[index]: _decode(value) for index, value in zip(indices(mask), values, strict=True)}

    def near_values(self, user_id: str, mask: int) -> Sequence[bytes] | None:
        """The result of `read_values` for one user if the local cache has it, else None."""
        off = mask & self._availability.disabled
        if off == mask:
            return [NULL] * mask.bit_count()
        near = self._trusted_near()
        values = near.find(user_id, mask & ~off) if near is not None else None
        if values is not None:
            self._count_near(len(values))
        return _with_nulls(values, mask, off) if off and values is not None else values

    async def read_as_of(self, asked: list[ComputeRow]) -> list[Profile]:
        """Compute past moments, uncached, in the given order. Cancellation interrupts the running statement.

        Raises:
            Overloaded: the read is shed.
            StoreUnavailable: the database does not answer, or the process stops.
        """
        overloaded = self._computation.history_overloaded
        if overloaded(len(asked)) and (not await self._turns.wait() or overloaded(len(asked))):
            raise Overloaded("history")
        return await self._computation.moments(asked)

    @property
    def history_overloaded(self) -> bool:
        """Whether `read_as_of` would shed any request now."""
        return self._computation.history_overloaded()

    async def close(self) -> None:
        """Wait for running reads and fills."""
        await self._turns.close()
        await self._batching.close()
        await self._computation.close()

    async def _in_pieces(self, wanted: Wanted, *, plain: bool, patient: bool = False) -> dict[str, Any]:
        # After its turn in the overload queue, a read asks the cache. Misses are computed if there is capacity by then.
        if self._computation.overloaded and not patient and not await self._turns.wait():
            raise Overloaded("reads")
        if len(wanted) <= GROUP_CAP:
            return await self._batching.submit(wanted, plain=plain, patient=patient)
        answer: dict[str, Any] = {}
        pairs = iter(wanted.items())
        while piece := dict(islice(pairs, GROUP_CAP)):
            answer.update(await self._batching.submit(piece, plain=plain, patient=patient or bool(answer)))
        return answer

    def _near_hits(self, wanted: Wanted) -> dict[str, Sequence[bytes]]:
        near = self._trusted_near()
        if near is None:
            return {}
        found = {
            user_id: values for user_id, mask in wanted.items() if (values := near.find(user_id, mask)) is not None
        }
        self._count_near(sum(map(len, found.values())))
        return found

    def _trusted_near(self) -> LocalCache | None:
        # One rule for all hits: if hits from the server would not be served, local ones are not served either.
        near = self._near
        return near if near is not None and self._cache.available and self._gate.holds() else None

    def _count_near(self, values: int) -> None:
        self._metrics.cache_hits.inc(values)
        self._metrics.near_hits.inc(values)


def _without(wanted: Wanted, off: int) -> dict[str, int]:
    """The masks without the disabled features; users without any other feature are left out."""
    return {user_id: mask & ~off for user_id, mask in wanted.items() if mask & ~off}


def _with_nulls(values: Sequence[bytes], mask: int, off: int) -> Sequence[bytes]:
    """The values of `mask & ~off`, with a null for each disabled feature."""
    read = iter(values)
    return [NULL if off >> index & 1 else next(read) for index in indices(mask)]
