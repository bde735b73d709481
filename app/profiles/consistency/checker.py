"""The audit of the promise: is what the cache holds of a user what a computation gives now?

A first look goes over many users at once: their cells, then one statement, then the log. Whatever differs there is left
to `app.profiles.consistency.inspection`, which looks again and tells an invalidation that did not happen (`stale`) and
a value that nothing explains (`unexplained`) from one that was right until its window moved on.

Invariants: what is called untrue held the same bytes before and after a computation that gave something else, while
the cache was trusted, and no event that nobody has acknowledged yet explains it. Nothing is changed but by `repair`.
Must not know Redis or SQL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from app.errors import CacheUnavailable
from app.features.registry import Registry
from app.profiles.codec import Value
from app.profiles.consistency.inspection import InspectedCell, Inspection, Inspector
from app.profiles.online.compute import Computation, ComputedValue
from app.profiles.online.invalidation import Stale
from app.profiles.ports import Cache, Cell, NewestEvents, RecentEvents
from app.telemetry import Metrics, logger

# `empty`: nothing is cached, so nothing can be wrong. `pending`: a value is older than an event whose taking-in is not
# over; nobody was promised anything yet. `unchecked`: the cache is away or not trusted, so reads compute.
Outcomes = Literal["consistent", "empty", "pending", "violation", "unchecked"]
Fault = Literal["stale", "unexplained"]
log = logger("profiles.consistency")


class Untrue(NamedTuple):
    """A cached value that reads would have answered, and that is not the truth. `newest` is by subject, of the log."""

    user_id: str
    feature: str
    fault: Fault
    held: Value
    computed: bytes
    seen_at_ms: int
    newest: Mapping[str, int]


class CheckResult(NamedTuple):
    """What a check of one user found; `untrue` where that is a violation."""

    user_id: str
    outcome: Outcomes
    untrue: tuple[Untrue, ...] = ()


class ConsistencyChecker:
    """Checks users, and repairs what it finds."""

    def __init__(
        self,
        *,
        cache: Cache,
        trusted: Callable[[], bool],
        users: NewestEvents,
        events: RecentEvents,
        computation: Computation,
        inspector: Inspector,
        drop: Callable[[Stale], Awaitable[None]],
        registry: Registry,
    ) -> None:
        """`trusted`: as `TrustGate.holds`. `drop` invalidates, and lets every process forget what it keeps near."""
        self._cache = cache
        self._trusted = trusted
        self._users = users
        self.events = events
        self._computation = computation
        self._inspector = inspector
        self._drop = drop
        self._registry = registry

    async def check(self, user_ids: Sequence[str]) -> list[CheckResult]:
        """A verdict on each, in the order given; some tens of users at a time. Raises `StoreUnavailable`."""
        if not user_ids:
            return []
        suspects = await self._suspects(user_ids)
        if suspects is None:
            return [CheckResult(user_id, "unchecked") for user_id in user_ids]
        return [
            await self._confirmed(user_id)
            if suspects[user_id] == "violation"
            else CheckResult(user_id, suspects[user_id])
            for user_id in user_ids
        ]

    async def repair(self, verdicts: Sequence[CheckResult]) -> int:
        """Drop what is untrue, wherever it is kept; how many values that were. Raises `StoreUnavailable`."""
        stale: dict[str, list[str]] = {}
        for verdict in verdicts:
            for item in verdict.untrue:
                stale.setdefault(item.user_id, []).append(item.feature)
        if stale:
            await self._drop(stale)
        return sum(map(len, stale.values()))

    async def _suspects(self, user_ids: Sequence[str]) -> Mapping[str, Outcomes] | None:
        """What one look gives, where `violation` is a mere suspicion; None while the cache is not to be believed."""
        names = self._registry.names
        try:
            if not (self._cache.available and self._trusted()):
                return None
            # The cells first, the log last, for the reasons that `Inspector` gives.
            _, held = await self._cache.read([Cell(user_id, name) for user_id in user_ids for name in names])
        except CacheUnavailable:
            return None
        pages = await self._computation.live(dict.fromkeys(user_ids, self._registry.full_mask))
        newest = await self._users.newest(user_ids)
        found: dict[str, Outcomes] = {}
        for place, user_id in enumerate(user_ids):
            own = held[place * len(names) : (place + 1) * len(names)]
            seq, outcomes = next((page.seq, page.outcomes[user_id]) for page in pages if user_id in page.outcomes)
            found[user_id] = self._first_look(user_id, own, seq, outcomes, newest)
        return found

    def _first_look(
        self,
        user_id: str,
        held: Sequence[bytes | None],
        seq: int,
        outcomes: Mapping[int, ComputedValue],
        newest: Mapping[tuple[str, str], int],
    ) -> Outcomes:
        found: Outcomes = "empty"
        for index, entry in enumerate(self._registry):
            value = self._inspector.live(index, held[index])
            if value is None:
                continue
            found = "consistent"
            if any(value.seq < newest.get((user_id, subject), 0) for subject in entry.invalidated_by):
                return "violation"
            outcome = outcomes[index]
            if outcome.error is None and value.seq <= seq and value.json != outcome.json:
                return "violation"
        return found

    async def _confirmed(self, user_id: str) -> CheckResult:
        inspection = await self._inspector.inspect(user_id)
        if inspection.cache != "trusted":
            return CheckResult(user_id, "unchecked")
        faults = [(cell, fault) for cell in inspection.cells if (fault := _fault(cell)) is not None]
        if not faults:
            return CheckResult(user_id, "consistent")
        oldest = min(cell.held.seq for cell, _ in faults if cell.held is not None)
        only_stale = all(fault == "stale" for _, fault in faults)
        if only_stale and await self.events.any_unconsumed(user_id, oldest):
            return CheckResult(user_id, "pending")
        newest = {subject: seq for (_, subject), seq in (await self._users.newest([user_id])).items()}
        return CheckResult(
            user_id, "violation", tuple(_untrue(user_id, cell, fault, inspection, newest) for cell, fault in faults)
        )


def _fault(cell: InspectedCell) -> Fault | None:
    if cell.state == "stale":
        return "stale"
    return "unexplained" if cell.difference == "unexplained" else None


def _untrue(
    user_id: str, cell: InspectedCell, fault: Fault, inspection: Inspection, newest: Mapping[str, int]
) -> Untrue:
    assert cell.held is not None  # a fault is of what is held
    return Untrue(user_id, cell.entry.name, fault, cell.held, cell.outcome.json, inspection.at_ms, newest)


def tell(verdict: CheckResult, metrics: Metrics, **where: object) -> None:
    """Count and log what a verdict says is untrue, with everything that it takes to explain it.

    The log names no user, who may be erased one day: only a hash. The numbers of the newest events lead to the user
    for as long as the database holds any of them.
    """
    for item in verdict.untrue:
        metrics.consistency_violations.labels(item.feature, item.fault).inc()
        log.error(
            "consistency_violation",
            user="user-sha256:" + hashlib.sha256(item.user_id.encode()).hexdigest(),
            feature=item.feature,
            fault=item.fault,
            held=item.held.json.decode(errors="replace"),
            computed=item.computed.decode(errors="replace"),
            held_seq=item.held.seq,
            held_computed_at_ms=item.held.computed_at_ms,
            held_expires_at_ms=item.held.expires_at_ms,
            fingerprint=item.held.fingerprint.decode(errors="replace"),
            newest_events=dict(item.newest),
            seen_at_ms=item.seen_at_ms,
            **where,
        )
