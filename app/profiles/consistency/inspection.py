"""Inspection: what the cache holds of some users, compared with the event log and with a computation.

An inspection takes no lease and fills nothing, so that the next one sees what this one saw. Invariant: a value that is
called stale, or different from what a computation gives, held the same bytes before and after a pause of `PAUSE_S`.
Between an event's commit and its DEL, about a millisecond, a stale value is no fault.
Must not know Redis or SQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from app.errors import CacheUnavailable
from app.features.registry import Feature, Registry, indices
from app.profiles.online.cache_protocol import LEASE, NULL, FeatureValue, Profile, decode
from app.profiles.online.compute import Computation
from app.profiles.ports import Cache, Cell, ComputeRow, NewestEvents

LOOKS = 3
PAUSE_S = 0.3
# A live computation counts events that lie ahead of its clock. The clock of another process may be so far ahead.
CLOCK_SKEW_MS = 1_000
State = Literal["fresh", "stale", "missing"]
Holds = Literal["value", "other definition", "lease", "nothing"]
Difference = Literal["none", "stale", "time", "unexplained"]
CacheState = Literal["trusted", "owed", "away"]
Fault = Literal["stale", "unexplained"]


class InspectedCell(NamedTuple):
    """One feature of a user; `feature` is its index.

    `state` and `holds` are None while the cache is away. `held` is the live value, if there is one. `difference` of
    that value from `outcome`, the result of a computation: an invalidation did not happen (`stale`); the window moved
    on over the same events (`time`); or neither explains it. It is None if nothing is held or could be computed.
    `disabled`: an admin has disabled the feature, so reads answer null whatever is held.
    """

    feature: int
    entry: Feature
    state: State | None
    holds: Holds | None
    held: FeatureValue | None
    outcome: FeatureValue
    difference: Difference | None
    disabled: bool

    @property
    def fault(self) -> Fault | None:
        """Why the held value should not be there."""
        if self.state == "stale":
            return "stale"
        return "unexplained" if self.difference == "unexplained" else None


class Inspection(NamedTuple):
    """A user at `at_ms`.

    `cache`: whether reads believe it now, or compute because invalidations are owed to it or because it is away.
    `newest`: the sequence number of the user's newest event by subject.
    """

    user_id: str
    at_ms: int
    cache: CacheState
    newest: Mapping[str, int]
    cells: tuple[InspectedCell, ...]

    def reading(self, index: int) -> FeatureValue:
        """What a read would have answered instead of this inspection of all features; nothing is filled."""
        cell = self.cells[index]
        if self.cache == "trusted" and cell.held is not None and not cell.disabled:
            return cell.held
        return cell.outcome


class CellFreshness(NamedTuple):
    """`value` is the live value, `feature` an index."""

    user_id: str
    feature: int
    state: State
    value: FeatureValue | None


class Inspector:
    """Inspects some tens of users at a time. A dead cache costs it one timeout at most."""

    def __init__(
        self,
        *,
        cache: Cache,
        trusted: Callable[[], bool],
        users: NewestEvents,
        computation: Computation,
        registry: Registry,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`trusted`: as `TrustGate.holds`."""
        self._cache = cache
        self._trusted = trusted
        self._users = users
        self._computation = computation
        self._registry = registry
        self._pause = pause
        self._not_computed = dict.fromkeys(range(len(registry)), FeatureValue(b"", -1, 0, None, NULL))

    @property
    def cache_state(self) -> CacheState:
        """As in `Inspection`, before anything is read."""
        return "away" if not self._cache.available else "trusted" if self._trusted() else "owed"

    async def inspect(self, user_ids: Sequence[str]) -> list[Inspection]:
        """Inspect users, in the order given. Raises `StoreUnavailable`."""
        return await self._inspect(user_ids, self._registry.full_mask, compute=True)

    async def freshness(self, user_ids: Sequence[str], mask: int | None = None) -> list[CellFreshness]:
        """The cells of each user, of the features in `mask` or of all, without computing anything.

        Raises:
            CacheUnavailable: also while the circuit breaker is open, at once.
            StoreUnavailable: the database does not answer.
        """
        found = await self._inspect(user_ids, self._registry.full_mask if mask is None else mask, compute=False)
        cells: list[CellFreshness] = []
        for one in found:
            for cell in one.cells:
                if cell.state is None:
                    raise CacheUnavailable("no cache is set, or it did not answer a moment ago")
                cells.append(CellFreshness(one.user_id, cell.feature, cell.state, cell.held))
        return cells

    async def live_values(self, user_id: str) -> list[FeatureValue | None] | None:
        """The live value of each feature; None while the cache is away."""
        held = await self._held([user_id], self._registry.full_mask)
        return [self._live(index, raw) for index, raw in held[user_id].items()] if held is not None else None

    async def _inspect(self, user_ids: Sequence[str], mask: int, *, compute: bool) -> list[Inspection]:
        found: dict[str, Inspection] = {}
        left = list(dict.fromkeys(user_ids))
        for _ in range(LOOKS):
            if left:
                found |= await self._look(left, mask, compute=compute)
                left = await self._suspects([found[user_id] for user_id in left], mask, found)
        # A value that has changed each time is being replaced again and again, so it is called missing.
        found |= {user_id: _without_faults(found[user_id]) for user_id in left}
        cache: CacheState = "trusted" if self._trusted() else "owed"
        return [one if one.cache == "away" else one._replace(cache=cache) for one in map(found.__getitem__, user_ids)]

    async def _suspects(self, looks: Sequence[Inspection], mask: int, found: dict[str, Inspection]) -> list[str]:
        """The users whose values at fault have changed after a pause, so that they must be looked at again."""
        suspects = [one for one in looks if any(cell.fault for cell in one.cells)]
        if not suspects:
            return []
        await self._pause(PAUSE_S)
        again = await self._held([one.user_id for one in suspects], mask)
        if again is None:
            found |= {one.user_id: _away(one) for one in suspects}
            return []
        return [
            one.user_id
            for one in suspects
            if any(c.fault and self._live(c.feature, again[one.user_id][c.feature]) != c.held for c in one.cells)
        ]

    async def _look(self, user_ids: Sequence[str], mask: int, *, compute: bool) -> dict[str, Inspection]:
        # The cells first: the computation has seen every event that invalidates one of them from here on. The log
        # last: it has every event that the computation saw, so a difference made by an event is never put down to time.
        held = await self._held(user_ids, mask)
        computed = await self._computation.live(dict.fromkeys(user_ids, mask)) if compute else {}
        newest: dict[str, dict[str, int]] = {user_id: {} for user_id in user_ids}
        for (user_id, subject), seq in (await self._users.newest(user_ids)).items():
            newest[user_id][subject] = seq
        looks: dict[str, Inspection] = {}
        for user_id in user_ids:
            one = computed.get(user_id, self._not_computed)
            raws = held[user_id] if held is not None else dict.fromkeys(indices(mask))
            cells = tuple(self._cell(index, raw, one, newest[user_id]) for index, raw in raws.items())
            looks[user_id] = Inspection(
                user_id, one[cells[0].feature].computed_at_ms, "trusted", newest[user_id], cells
            )
        if held is None:
            return {user_id: _away(one) for user_id, one in looks.items()}
        return await self._explained(looks)

    async def _held(self, user_ids: Sequence[str], mask: int) -> dict[str, dict[int, bytes | None]] | None:
        """What the cells of each user hold, by index; None while the cache is away."""
        wanted = indices(mask)
        cells = [Cell(user_id, self._registry.names[index]) for user_id in user_ids for index in wanted]
        try:
            held = iter((await self._cache.read(cells))[1]) if self._cache.available else None
        except CacheUnavailable:
            return None
        return {user_id: {index: next(held) for index in wanted} for user_id in user_ids} if held is not None else None

    def _live(self, index: int, raw: bytes | None) -> FeatureValue | None:
        """The value that a cell holds, if it is of this process's definition."""
        value = decode(raw)
        known = self._registry[index].fingerprint.encode()
        return value if value is not None and value.fingerprint == known else None

    def _cell(self, index: int, raw: bytes | None, profile: Profile, newest: Mapping[str, int]) -> InspectedCell:
        entry, outcome = self._registry[index], profile[index]
        disabled = bool(self._computation.availability.disabled >> index & 1)
        value = self._live(index, raw)
        if value is None:
            return InspectedCell(index, entry, "missing", _holds(raw), None, outcome, None, disabled)
        stale = value.is_stale(entry.newest_event(newest))
        difference: Difference | None = None
        if outcome.error is None and value.seq <= outcome.seq:  # else nothing is known that the value does not know
            difference = "none" if value.json == outcome.json else "stale" if stale else "unexplained"
        return InspectedCell(index, entry, "stale" if stale else "fresh", "value", value, outcome, difference, disabled)

    async def _explained(self, looks: dict[str, Inspection]) -> dict[str, Inspection]:
        """Calls a difference `time` if the value was right at the moment of its computation.

        No event that bears on such a value came since, or it would be stale. So if the same SQL, asked about that
        moment, gives the value, then only the window has moved.
        """
        different = [
            (one.user_id, cell.feature, cell.held)
            for one in looks.values()
            for cell in one.cells
            if cell.difference == "unexplained" and cell.held is not None
        ]
        if not different:
            return looks
        outcomes = iter(
            await self._computation.moments(
                [
                    ComputeRow(user_id, 1 << index, value.computed_at_ms + later_ms)
                    for user_id, index, value in different
                    for later_ms in (0, CLOCK_SKEW_MS)
                ]
            )
        )
        moved = {
            (user_id, index)
            for user_id, index, value in different
            # A list, so that both are taken from the iterator, whatever the first says.
            if value.json in [next(outcomes)[index].json, next(outcomes)[index].json]
        }
        return {
            user_id: one._replace(
                cells=tuple(
                    cell._replace(difference="time") if (user_id, cell.feature) in moved else cell for cell in one.cells
                )
            )
            for user_id, one in looks.items()
        }


def _away(inspection: Inspection) -> Inspection:
    """Nothing is claimed of what the cells hold."""
    cells = (cell._replace(state=None, holds=None, held=None, difference=None) for cell in inspection.cells)
    return inspection._replace(cache="away", cells=tuple(cells))


def _without_faults(inspection: Inspection) -> Inspection:
    cells = (
        cell._replace(state="missing", holds="nothing", held=None, difference=None) if cell.fault else cell
        for cell in inspection.cells
    )
    return inspection._replace(cells=tuple(cells))


def _holds(raw: bytes | None) -> Holds:
    """What a cell without a live value holds."""
    if raw is None:
        return "nothing"
    return "lease" if raw.startswith(LEASE) else "other definition"
