"""Inspects users: compares their cached values with the event log and with a computation, and writes nothing.

Invariant: a value is reported as stale or unexplained only if its key held the same bytes before and after a pause of
`PAUSE_S`. So a stale value is not reported in the moment between the commit of an event and the DEL.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import msgspec

from app.errors import CacheUnavailable
from app.features.ids import hash_slot
from app.features.registry import Feature, indices
from app.profiles.online.cache_protocol import FeatureValue, Filler, Profile, ReadTime, decode, not_computed
from app.profiles.online.compute import Computation
from app.profiles.ports import EVERY_SLOT, UNAVAILABLE, Held, UserQueries

PAUSE_S = 0.3
State = Literal["fresh", "stale", "missing"]
Holds = Literal["value", "expired", "other definition", "lease", "nothing"]
Difference = Literal["none", "stale", "unexplained"]
Fault = Literal["stale", "unexplained"]


class InspectedCell(NamedTuple):
    """One feature of a user, as cached and as computed. `feature` is the index of the feature in the registry.

    `holds` says what the key in the cache contains, and `held` is its value if a read may serve it. `state` is `stale`
    if an event should have deleted that value, `fresh` if not, and `missing` if `held` is None. All three are None
    while the cache is unavailable. `outcome` is the computed value. `difference` compares it with `held`: `none` if
    they are equal, `stale` if an event explains the difference, `unexplained` otherwise. It is None if either value is
    missing, or if `held` was computed later than `outcome`, by a process whose clock is ahead. `disabled`: an admin has
    disabled the feature.
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
        """Why the cached value is wrong: `stale` or `unexplained`; None if it is right or absent."""
        if self.state == "stale":
            return "stale"
        return "unexplained" if self.difference == "unexplained" else None


class Inspection(NamedTuple):
    """The result of inspecting one user at the time `at_ms`, with one cell per feature. `cache` is `trusted` if reads
    serve cached values now, `owed` if reads compute because stale keys must be deleted first, and `away` if no cache
    answers. `newest` has, for each subject such as `signals.tip.feedback`, the number of the user's newest event."""

    user_id: str
    at_ms: int
    cache: Literal["trusted", "owed", "away"]
    newest: Mapping[str, int]
    cells: tuple[InspectedCell, ...]

    def reading(self, index: int) -> FeatureValue:
        """The value that a read of the feature with this index would have returned."""
        cell = self.cells[index]
        return cell.held if self.cache == "trusted" and cell.held is not None and not cell.disabled else cell.outcome


class Inspector(msgspec.Struct, kw_only=True, eq=False):
    """Inspects some tens of users at a time. If the cache does not answer, an inspection waits for at most one timeout.
    `distrusted` returns the hash slots of users whose cached values reads may not serve; see `TrustGate.distrusted`."""

    filler: Filler
    distrusted: Callable[[], Awaitable[frozenset[int]]]
    users: UserQueries
    computation: Computation
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def inspect(
        self, user_ids: Sequence[str], mask: int | None = None, *, compute: bool = True
    ) -> list[Inspection]:
        """Inspect users and the features in `mask`, by default all; return one inspection for each user, in order.
        Unless `compute`, cached values are compared with the event log only: each cell's `difference` is None, and its
        `outcome` a null value. Raises `StoreUnavailable`."""
        if not user_ids:
            return []
        mask = self.computation.registry.full_mask if mask is None else mask
        found = await self._inspect_once(list(dict.fromkeys(user_ids)), mask, compute=compute)
        suspects = [one.user_id for one in found.values() if any(cell.fault for cell in one.cells)]
        if suspects:
            await self.pause(PAUSE_S)
            again = await self._held(suspects, mask)
            at = ReadTime.of(self.computation.clock.now_ms())
            for user_id in suspects:
                one, held = found[user_id], again[user_id]
                if held is None:
                    found[user_id] = _away(one)
                else:
                    cells = [self._confirmed(cell, held[cell.feature], at) for cell in one.cells]
                    found[user_id] = one._replace(cells=tuple(cells))
        distrusted = await self.distrusted()
        return [
            one._replace(cache="owed")
            if one.cache != "away" and distrusted & {EVERY_SLOT, hash_slot(one.user_id)}
            else one
            for one in map(found.__getitem__, user_ids)
        ]

    def _confirmed(self, cell: InspectedCell, raw: bytes | None, at: ReadTime) -> InspectedCell:
        """Check a cell again after the pause; `raw` is what its key holds now. If the cached value looked wrong and is
        no longer in the key, return the cell as `missing`. Otherwise return it unchanged."""
        if cell.fault is None or self.filler.hit(cell.feature, raw, at) == cell.held:
            return cell
        return cell._replace(state="missing", holds="nothing", held=None, difference=None)

    async def _inspect_once(self, user_ids: Sequence[str], mask: int, *, compute: bool) -> dict[str, Inspection]:
        # The cells are read first, so the computation has seen every event that invalidated one of them until then. The
        # log is read last, so it has every event that the computation saw, which could explain a difference.
        held = await self._held(user_ids, mask)
        computed = await self.computation.live(dict.fromkeys(user_ids, mask)) if compute else {}
        newest: dict[str, dict[str, int]] = {user_id: {} for user_id in user_ids}
        for (user_id, subject), seq in (await self.users.newest(user_ids)).items():
            newest[user_id][subject] = seq
        now_ms = self.computation.clock.now_ms()
        uncomputed = dict.fromkeys(indices(mask), not_computed(now_ms, "not computed"))
        found: dict[str, Inspection] = {}
        for user_id in user_ids:
            profile = computed.get(user_id, uncomputed)
            raws = held[user_id] or dict.fromkeys(indices(mask))
            cells = tuple(self._cell(index, raw, profile, newest[user_id]) for index, raw in raws.items())
            one = Inspection(user_id, cells[0].outcome.computed_at_ms, "trusted", newest[user_id], cells)
            found[user_id] = _away(one) if held[user_id] is None else one
        return found

    async def _held(self, user_ids: Sequence[str], mask: int) -> dict[str, dict[int, bytes | None] | None]:
        """The contents of each user's keys by feature index; None for a user whose cache server does not answer."""
        held: Held = {}
        with suppress(CacheUnavailable):
            if self.filler.cache.available:
                _, held = await self.filler.read(dict.fromkeys(user_ids, mask))
        answered = {user_id: cells for user_id, cells in held.items() if UNAVAILABLE not in cells.values()}
        return {user_id: answered.get(user_id) for user_id in user_ids}

    def _cell(self, index: int, raw: bytes | None, profile: Profile, newest: Mapping[str, int]) -> InspectedCell:
        entry, outcome = self.computation.registry[index], profile[index]._replace(expires_at_ms=None)  # not cached
        disabled = bool(self.computation.availability.disabled >> index & 1)
        value = self.filler.hit(index, raw, ReadTime.of(outcome.computed_at_ms))
        if value is None:
            return InspectedCell(index, entry, "missing", self._holds(index, raw), None, outcome, None, disabled)
        stale = value.is_stale(entry.newest_event(newest))
        difference: Difference | None = None
        # The clock of another process may be ahead, and an event may have left the window by that clock already.
        if outcome.error is None and value.computed_at_ms <= outcome.computed_at_ms:
            difference = "none" if value.json == outcome.json else "stale" if stale else "unexplained"
        return InspectedCell(index, entry, "stale" if stale else "fresh", "value", value, outcome, difference, disabled)

    def _holds(self, index: int, raw: bytes | None) -> Holds:
        """Classify the contents of a key that no read would serve."""
        value = decode(raw)
        if value is None:
            return "nothing" if raw is None else "lease"
        own = self.computation.registry[index].fingerprint.encode()
        return "expired" if value.fingerprint == own else "other definition"


def _away(inspection: Inspection) -> Inspection:
    """Mark an inspection as made without a cache, and remove the cached values and what was derived from them."""
    cells = (cell._replace(state=None, holds=None, held=None, difference=None) for cell in inspection.cells)
    return inspection._replace(cache="away", cells=tuple(cells))
