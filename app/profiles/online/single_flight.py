"""SingleFlight: one computation for all readers of this process who meet the same token.

A flight lasts from its token to the reply of its fill. To join it is right because whoever saw the token in the key
saw that no event had deleted it, so the flight's snapshot is no older than what the reader may be told.
Invariant: every flight lands, whatever happens to it; a joiner never waits for one that does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, NamedTuple

from app.features.registry import indices
from app.profiles.online.compute import Computation
from app.profiles.online.fill import Filler, Filling, Profile
from app.profiles.ports import Epoch

# A fill waits for so long: the answers that it was computed for go out first, and the fills of several flights share a
# write. Whoever asks meanwhile meets the lease, and joins.
FILL_AFTER_S = 0.002


class Boarding(NamedTuple):
    """What a flight is known by: a cell, and the token that its key held under an epoch."""

    epoch: Epoch
    user_id: str
    feature: int
    token: bytes


class _Landing(NamedTuple):
    """What a flight has computed, on its way into the cache."""

    epoch: Epoch
    boardings: list[Boarding]
    fillings: list[Filling]


class SingleFlight:
    """The flights of one process."""

    def __init__(self, computation: Computation, filler: Filler) -> None:
        self._computation = computation
        self._filler = filler
        self._aloft: dict[Boarding, asyncio.Future[Mapping[str, Profile]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._landing: list[_Landing] = []
        self._loop = asyncio.get_running_loop()

    def aloft(self, boarding: Boarding) -> asyncio.Future[Mapping[str, Profile]] | None:
        """The flight to join, where there is one. Shield it: it is everybody's."""
        return self._aloft.get(boarding)

    async def fly(self, epoch: Epoch, boardings: Iterable[Boarding]) -> Mapping[str, Profile]:
        """Compute cells under their tokens, and fill them after the answer.

        Raises:
            StoreUnavailable: the database does not answer; joiners are told the same.
        """
        boardings = list(boardings)
        flight: asyncio.Future[Mapping[str, Profile]] = self._loop.create_future()
        wanted: dict[str, int] = {}
        for boarding in boardings:
            self._aloft[boarding] = flight
            wanted[boarding.user_id] = wanted.get(boarding.user_id, 0) | 1 << boarding.feature
        try:
            profiles, seqs = await self._compute(wanted)
            fillings = [
                Filling(
                    item.user_id, item.feature, item.token, seqs[item.user_id], profiles[item.user_id][item.feature]
                )
                for item in boardings
            ]
        except BaseException as error:
            self._land(boardings)
            flight.set_exception(error)
            flight.exception()  # marked as seen: there may be no joiner
            raise
        flight.set_result(profiles)
        self._landing.append(_Landing(epoch, boardings, fillings))
        if len(self._landing) == 1:
            self.spawn(self._fill())
        return profiles

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin work that `close` waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Finish what was begun, fills included."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compute(self, wanted: Mapping[str, int]) -> tuple[dict[str, Profile], dict[str, int]]:
        profiles: dict[str, Profile] = {}
        seqs: dict[str, int] = {}
        for user_id, one in (await self._computation.live(wanted)).items():
            seqs[user_id] = one.seq
            profiles[user_id] = {
                index: self._filler.reading(index, one.outcomes[index], one.at_ms) for index in indices(wanted[user_id])
            }
        return profiles, seqs

    async def _fill(self) -> None:
        try:
            await asyncio.sleep(FILL_AFTER_S)
        finally:
            landing, self._landing = self._landing, []
            try:
                for epoch in {flight.epoch for flight in landing}:
                    fillings = [filling for flight in landing if flight.epoch == epoch for filling in flight.fillings]
                    await self._filler.store(epoch, fillings)
            finally:
                for flight in landing:
                    self._land(flight.boardings)

    def _land(self, boardings: Iterable[Boarding]) -> None:
        for boarding in boardings:
            del self._aloft[boarding]
