"""Reading profiles: hits from the cache, misses computed once and filled, everything computed where the cache is away.

Requests of one tick of the event loop share one MGET; their misses share one statement, and one flight with whoever
misses the same cell under the same token (`app.profiles.flights`).
Invariant: a hit is served only while the trust gate holds, asked when the request begins. Must not know Redis or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

from app.errors import CacheUnavailable
from app.features.registry import Registry, indices
from app.profiles.computation import Computation
from app.profiles.filling import Filler, Missing, Profile, Reading, own_outcomes
from app.profiles.flights import Boarding, Flights
from app.profiles.ports import Asked, Cache, Epoch
from app.profiles.trust import TrustGate
from app.telemetry import Metrics

GROUP_CAP = 256

Wanted = Mapping[str, int]


class _Request(NamedTuple):
    wanted: Wanted
    done: asyncio.Future[dict[str, Profile]]


class _Group:
    """Requests that will share one MGET."""

    def __init__(self) -> None:
        self.requests: list[_Request] = []
        self.wanted: dict[str, int] = {}

    def add(self, request: _Request) -> None:
        self.requests.append(request)
        for user_id, mask in request.wanted.items():
            self.wanted[user_id] = self.wanted.get(user_id, 0) | mask


class ProfileReader:
    """Answers masks of features for users. One per process."""

    def __init__(
        self,
        *,
        cache: Cache,
        gate: TrustGate,
        computation: Computation,
        filler: Filler,
        registry: Registry,
        metrics: Metrics,
    ) -> None:
        self._cache = cache
        self._gate = gate
        self._computation = computation
        self._filler = filler
        self._registry = registry
        self._metrics = metrics
        self._open: _Group | None = None
        self._flights = Flights(computation, filler)

    async def read(self, wanted: Wanted) -> dict[str, Profile]:
        """Read each user's mask of features, as of now or later than the last acknowledged event.

        Raises:
            StoreUnavailable: when values must be computed and the database does not answer.
        """
        if len(wanted) <= GROUP_CAP:
            return await self._read(wanted)
        profiles: dict[str, Profile] = {}
        pairs = iter(wanted.items())
        while piece := dict(islice(pairs, GROUP_CAP)):
            profiles.update(await self._read(piece))
        return profiles

    async def read_as_of(self, asked: list[Asked]) -> list[Profile]:
        """Compute past moments, uncached, in the order asked."""
        outcomes = await self._computation.moments(asked)
        return [
            {
                index: Reading(outcome.json, row.now_ms or 0, None, False, outcome.error)
                for index, outcome in computed.items()
            }
            for row, computed in zip(asked, outcomes, strict=True)
        ]

    async def close(self) -> None:
        """Finish what was begun, background fills included."""
        await self._flights.close()

    async def _read(self, wanted: Wanted) -> dict[str, Profile]:
        if not self._cache.available:
            return await self._degrade(wanted, "unavailable")
        if not self._gate.holds():
            return await self._degrade(wanted, "owed")
        loop = asyncio.get_running_loop()
        request = _Request(wanted, loop.create_future())
        if self._open is None or len(self._open.wanted) + len(wanted) > GROUP_CAP:
            self._open = _Group()
            loop.call_soon(self._flush, self._open)
        self._open.add(request)
        return await request.done

    def _flush(self, group: _Group) -> None:
        if self._open is group:
            self._open = None
        self._flights.spawn(self._serve(group))

    async def _serve(self, group: _Group) -> None:
        waiting = group.requests
        try:
            profiles: dict[str, Profile] = {user_id: {} for user_id in group.wanted}
            epoch, missing = await self._look_up(group.wanted, profiles)
            if missing:
                waiting = _answer_complete(waiting, profiles, missing)
                await self._fill_in(epoch, missing, profiles)
            _answer(waiting, profiles)
        except CacheUnavailable:
            await asyncio.gather(*(self._degrade_request(request) for request in waiting))
        except BaseException as error:
            for request in waiting:
                if not request.done.done():
                    request.done.set_exception(error)
            if not isinstance(error, Exception):
                raise

    async def _degrade_request(self, request: _Request) -> None:
        try:
            answer = await self._degrade(request.wanted, "unavailable")
        except Exception as error:
            if not request.done.done():
                request.done.set_exception(error)
        else:
            if not request.done.done():
                request.done.set_result(answer)

    async def _degrade(self, wanted: Wanted, reason: str) -> dict[str, Profile]:
        self._metrics.degraded_reads.labels(reason).inc(len(wanted))
        computed = await self._computation.live(wanted)
        return {
            user_id: {
                index: Reading(outcomes[index].json, part.at_ms, None, False, outcomes[index].error)
                for index in indices(wanted[user_id])
            }
            for part, user_id, outcomes in own_outcomes(computed, wanted)
        }

    async def _look_up(self, wanted: Wanted, profiles: dict[str, Profile]) -> tuple[Epoch, list[Missing]]:
        """Step 1: one MGET. Hits go into `profiles`, the rest is returned."""
        places = [(user_id, index) for user_id, mask in wanted.items() for index in indices(mask)]
        epoch, held = await self._cache.read([self._filler.cell(*place) for place in places])
        missing: list[Missing] = []
        for (user_id, index), raw in zip(places, held, strict=True):
            reading = self._filler.hit(index, raw)
            if reading is None:
                missing.append(Missing(user_id, index, raw))
            else:
                profiles[user_id][index] = reading
        self._metrics.cache_hits.inc(len(places) - len(missing))
        self._metrics.cache_misses.inc(len(missing))
        return epoch, missing

    async def _fill_in(self, epoch: Epoch, missing: list[Missing], profiles: dict[str, Profile]) -> None:
        """Steps 2 to 4 for what the MGET did not give. The fill itself goes on after the answer."""
        tokens = await self._filler.tokens(epoch, missing)
        joined: list[tuple[Missing, asyncio.Future[Mapping[str, Profile]]]] = []
        mine: dict[Boarding, None] = {}
        for item, token in zip(missing, tokens, strict=True):
            if item.held is None and (reading := self._filler.hit(item.feature, token)) is not None:
                profiles[item.user_id][item.feature] = reading  # somebody filled it since the MGET
                continue
            boarding = Boarding(epoch, item.user_id, item.feature, token)
            if (flight := self._flights.aloft(boarding)) is not None:
                joined.append((item, flight))
            else:
                mine[boarding] = None
        if mine:
            for user_id, profile in (await self._flights.fly(epoch, mine)).items():
                profiles[user_id].update(profile)
        for item, flight in joined:
            profiles[item.user_id][item.feature] = (await asyncio.shield(flight))[item.user_id][item.feature]


def _answer(requests: Iterable[_Request], profiles: Mapping[str, Profile]) -> None:
    for request in requests:
        if not request.done.done():
            request.done.set_result({user_id: profiles[user_id] for user_id in request.wanted})


def _answer_complete(
    requests: list[_Request], profiles: Mapping[str, Profile], missing: list[Missing]
) -> list[_Request]:
    """Answer those that miss nothing; the others are returned."""
    lacking = {item.user_id for item in missing}
    complete = [request for request in requests if lacking.isdisjoint(request.wanted)]
    _answer(complete, profiles)
    return [request for request in requests if not lacking.isdisjoint(request.wanted)]
