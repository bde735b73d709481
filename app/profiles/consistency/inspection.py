"""Inspection: one user's cells as an admin sees them, with what a computation gives now, and nothing changed by it.

The cells are read as they are: no lease is taken and nothing is filled, so that a second look sees what the first saw.
Invariant: a cell that is called stale, or different from what a computation gives, held the same bytes before and
after that computation and a pause. Between an event's commit and its DEL, which takes a millisecond, it is no fault.
Must not know Redis or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from app.errors import CacheUnavailable
from app.features.clock import Clock
from app.features.registry import Feature, Registry
from app.profiles.codec import LEASE, Value, decode
from app.profiles.online.compute import Computation, ComputedValue
from app.profiles.online.fill import Reading, own_outcomes
from app.profiles.ports import Cache, Cell, ComputeRow, NewestEvents

LOOKS = 3
SECOND_LOOK_S = 0.3
# A computation reads the clock again when its statement begins; so much later than `computed_at_ms` at most.
BEGINNING_MS = 1_000
State = Literal["fresh", "stale", "missing"]
Holds = Literal["value", "other definition", "lease", "nothing"]
Difference = Literal["none", "stale", "time", "unexplained"]
Trust = Literal["trusted", "owed", "away"]


class InspectedCell(NamedTuple):
    """One feature of the user.

    `state` and `holds` are None while the cache is away; `held` is the live value, where there is one. `difference` of
    that value from `outcome`, what a computation gives: an invalidation did not happen (`stale`); the window moved on
    over the same events (`time`); or neither explains it. None where nothing is held, or nothing could be computed.
    `disabled`: an admin has disabled the feature, so reads answer null whatever is held.
    """

    entry: Feature
    state: State | None
    holds: Holds | None
    held: Value | None
    outcome: ComputedValue
    difference: Difference | None
    disabled: bool = False


class Inspection(NamedTuple):
    """A user at `at_ms`. `cache`: whether reads believe it now, or compute since it is away, or owed invalidations."""

    at_ms: int
    cache: Trust
    cells: tuple[InspectedCell, ...]

    def reading(self, index: int) -> Reading:
        """What a read would have answered, had it come instead of this look; a computed value stays uncached."""
        cell = self.cells[index]
        if self.cache == "trusted" and cell.held is not None and not cell.disabled:
            return Reading(cell.held.json, cell.held.computed_at_ms, cell.held.expires_at_ms, True)
        return Reading(cell.outcome.json, self.at_ms, None, False, cell.outcome.error)


class _Look(NamedTuple):
    """What the cells held (None: the cache is away), then what was computed, then what the log said.

    `moved`: the features whose held value was right when it was computed.
    """

    held: Sequence[bytes | None] | None
    at_ms: int
    seq: int
    outcomes: Mapping[int, ComputedValue]
    newest: Mapping[str, int]
    moved: frozenset[int] = frozenset()


class Inspector:
    """Looks at one user at a time. A dead cache costs it one timeout at most."""

    def __init__(
        self,
        *,
        cache: Cache,
        trusted: Callable[[], bool],
        users: NewestEvents,
        computation: Computation,
        registry: Registry,
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`trusted`: as `TrustGate.holds`."""
        self._cache = cache
        self._trusted = trusted
        self._users = users
        self._computation = computation
        self._registry = registry
        self._clock = clock
        self._pause = pause

    async def held(self, user_id: str) -> list[bytes | None] | None:
        """What each cell holds, in the order of the registry; None while the cache is away."""
        try:
            if not self._cache.available:
                return None
            _, held = await self._cache.read([Cell(user_id, name) for name in self._registry.names])
        except CacheUnavailable:
            return None
        return held

    def live(self, index: int, raw: bytes | None) -> Value | None:
        """The value among what a cell holds, where it is one under this process's definition."""
        value = decode(raw)
        known = self._registry[index].fingerprint.encode()
        return value if value is not None and value.fingerprint == known else None

    async def inspect(self, user_id: str) -> Inspection:
        """Look at a user. Raises `StoreUnavailable`."""
        look = await self._confirmed(user_id)
        trust: Trust = "away" if look.held is None else "trusted" if self._trusted() else "owed"
        off = self._computation.availability.disabled
        cells = tuple(
            self._cell(index, look)._replace(disabled=bool(off >> index & 1)) for index in range(len(self._registry))
        )
        return Inspection(look.at_ms, trust, cells)

    async def _confirmed(self, user_id: str) -> _Look:
        """Look until whatever is suspicious is the same at a second look, or for so many times."""
        for left in range(LOOKS, 0, -1):
            look = await self._look(user_id)
            suspects = [index for index in range(len(self._registry)) if self._is_suspicious(index, look)]
            if not suspects or look.held is None:
                return look
            await self._pause(SECOND_LOOK_S)
            again = await self.held(user_id)
            if again is None:
                return look._replace(held=None)
            if all(again[index] == look.held[index] for index in suspects):
                return look
            if left == 1:  # events keep coming: what is held by now is told, and nothing of how it differs
                return look._replace(held=again, seq=-1)
        raise AssertionError("the last look returns")

    async def _look(self, user_id: str) -> _Look:
        # The cells first: whatever is invalidated from here on, the computation has seen. The log last: it tells of
        # every event that the computation saw, so that a difference which an event made is never put down to time.
        held = await self.held(user_id)
        wanted = {user_id: self._registry.full_mask}
        ((part, _, outcomes),) = own_outcomes(await self._computation.live(wanted), wanted)
        newest = await self._users.newest([user_id])
        look = _Look(held, part.at_ms, part.seq, outcomes, {subject: seq for (_, subject), seq in newest.items()})
        return look._replace(moved=await self._moved(user_id, look))

    def _value(self, index: int, look: _Look) -> Value | None:
        return self.live(index, look.held[index]) if look.held is not None else None

    def _is_stale(self, index: int, value: Value, look: _Look) -> bool:
        return any(value.seq < look.newest.get(subject, 0) for subject in self._registry[index].invalidated_by)

    def _differs(self, index: int, value: Value, look: _Look) -> bool | None:
        """Whether a computation gives another value; None where it failed, or knew less than the value's did."""
        outcome = look.outcomes[index]
        if outcome.error is not None or value.seq > look.seq:
            return None
        return value.json != outcome.json

    def _difference(self, index: int, value: Value, look: _Look) -> Difference | None:
        differs = self._differs(index, value, look)
        if not differs:
            return None if differs is None else "none"
        if self._is_stale(index, value, look):
            return "stale"
        return "time" if index in look.moved else "unexplained"

    def _is_suspicious(self, index: int, look: _Look) -> bool:
        value = self._value(index, look)
        if value is None:
            return False
        return self._is_stale(index, value, look) or self._difference(index, value, look) == "unexplained"

    async def _moved(self, user_id: str, look: _Look) -> frozenset[int]:
        """Which of the different values are what was right when they were computed.

        No event that bears on such a value came since, or it would be stale. So the same SQL, asked about that moment,
        must give the value; where it does, only the window has moved.
        """
        different = [
            (index, value)
            for index in range(len(self._registry))
            if (value := self._value(index, look)) is not None and self._difference(index, value, look) == "unexplained"
        ]
        asked = [
            ComputeRow(user_id, 1 << index, value.computed_at_ms + later_ms)
            for index, value in different
            for later_ms in (0, BEGINNING_MS)
        ]
        outcomes = iter(await self._computation.moments(asked) if asked else [])
        return frozenset(
            index
            for index, value in different
            # Both are taken from the iterator, whatever the first says.
            if value.json in [next(outcomes)[index].json, next(outcomes)[index].json]
        )

    def _cell(self, index: int, look: _Look) -> InspectedCell:
        entry, outcome = self._registry[index], look.outcomes[index]
        if look.held is None:
            return InspectedCell(entry, None, None, None, outcome, None)
        value = self._value(index, look)
        if value is None:
            return InspectedCell(entry, "missing", _holds(look.held[index]), None, outcome, None)
        state: State = "stale" if self._is_stale(index, value, look) else "fresh"
        return InspectedCell(entry, state, "value", value, outcome, self._difference(index, value, look))


def _holds(raw: bytes | None) -> Holds:
    """What a cell without a live value holds."""
    if raw is None:
        return "nothing"
    return "lease" if raw.startswith(LEASE) else "other definition"
