"""The consistency check: do the cached values of a user equal a recomputation?

A *violation* is a wrong cached value that `Inspector` confirmed. It is reported only if reads were allowed to serve
cached values before and after the inspection, and no event that is still being ingested explains it. Only `repair`
changes the cache.

The monitor of a worker checks the users of some recent events 1 s, 1 min and 5 min after each event. Each second, it
chooses at most `users_per_s` users at random from the newest events. This also limits the number of scheduled checks.
If the worker stops, its scheduled checks are lost: the monitor only samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Literal, NamedTuple

import msgspec

from app.features.clock import rfc3339
from app.features.ids import user_hash
from app.profiles.consistency.inspection import InspectedCell, Inspection, Inspector
from app.profiles.online.invalidation import Stale
from app.profiles.ports import RecentEvent
from app.telemetry import Metrics, logger

DELAYS = (("1s", 1.0), ("1min", 60.0), ("5min", 300.0))
ROUND_S = 1.0
NEWEST = 200
AT_ONCE = 16
# A check that is later than this would not measure its delay: the machine slept, or the database did not answer.
LATE_S = 10.0
# `empty`: nothing is cached, so nothing can be wrong. `pending`: a value is older than an event that has not been
# acknowledged yet. `unchecked`: the cache is unavailable or not trusted, so reads compute.
Outcome = Literal["consistent", "empty", "pending", "violation", "unchecked"]
log = logger("profiles.consistency")


class CheckResult(NamedTuple):
    """The result of checking one user. `inspection` is None if the user was not checked. `untrue` has the features with
    a wrong cached value; it is empty unless the outcome is `violation`."""

    user_id: str
    outcome: Outcome
    inspection: Inspection | None = None
    untrue: tuple[InspectedCell, ...] = ()


class ConsistencyChecker(msgspec.Struct, kw_only=True, eq=False):
    """Checks the cached values of users. `drop` deletes cached values and makes every process clear its local cache."""

    inspector: Inspector
    drop: Callable[[Stale], Awaitable[None]]

    async def check(self, user_ids: Sequence[str]) -> list[CheckResult]:
        """Check some tens of users' cached values; return one result per user, in order. Raises `StoreUnavailable`."""
        if await self.inspector.cache_state() != "trusted":
            return [CheckResult(user_id, "unchecked") for user_id in user_ids]
        return [await self._result(inspection) for inspection in await self.inspector.inspect(user_ids)]

    async def repair(self, results: Sequence[CheckResult]) -> int:
        """Delete from the cache the wrong values that a check found; return their number. Raises `StoreUnavailable`."""
        stale = {result.user_id: [cell.entry.name for cell in result.untrue] for result in results if result.untrue}
        if stale:
            await self.drop(stale)
        return sum(map(len, stale.values()))

    async def _result(self, inspection: Inspection) -> CheckResult:
        user_id = inspection.user_id
        held = [cell.held for cell in inspection.cells if cell.held is not None]
        faults = tuple(cell for cell in inspection.cells if cell.fault is not None)
        outcome: Outcome = "consistent" if held else "empty"
        if inspection.cache != "trusted":
            outcome = "unchecked"
        elif faults:
            outcome = "violation"
            oldest = min(cell.held.version for cell in faults if cell.held is not None)
            only_stale = all(cell.fault == "stale" for cell in faults)
            if only_stale and await self.inspector.users.any_unconsumed(user_id, oldest):
                outcome = "pending"
        return CheckResult(user_id, outcome, inspection, faults if outcome == "violation" else ())


def report(result: CheckResult, metrics: Metrics, **context: object) -> list[dict[str, object]]:
    """Count and log the wrong cached values of one user. Return the facts that are needed to explain each.

    The log has a hash instead of the user id, because the user may be erased later. The sequence numbers of the newest
    events identify the user as long as the database holds these events.
    """
    found: list[dict[str, object]] = []
    for cell in result.untrue:
        assert cell.held is not None
        assert cell.held.expires_at_ms is not None
        assert result.inspection is not None
        metrics.consistency_violations.labels(cell.entry.name, cell.fault).inc()
        facts: dict[str, object] = {
            "feature": cell.entry.name,
            "fault": cell.fault,
            "held": cell.held.json.decode(errors="replace"),
            "computed": cell.outcome.json.decode(errors="replace"),
            "held_version": cell.held.version,
            "held_computed_at": rfc3339(cell.held.computed_at_ms),
            "held_expires_at": rfc3339(cell.held.expires_at_ms),
            "fingerprint": cell.held.fingerprint.decode(errors="replace"),
            "newest_events": dict(result.inspection.newest),
            "seen_at": rfc3339(result.inspection.at_ms),
        }
        log.error("consistency_violation", user=user_hash(result.user_id), **facts, **context)
        found.append(facts)
    return found


class ScheduledCheck(NamedTuple):
    """A check of a user, scheduled for the time `due` on the monotonic clock, in seconds. `seq` is the sequence number
    of the event that led to it. `after` names the delay since the event, such as `1min`."""

    due: float
    after: str
    user_id: str
    seq: int


class ConsistencyMonitor(msgspec.Struct, eq=False):
    """Samples users with recent events, and checks each of them after every delay in `DELAYS`. Each worker has one
    instance and calls its `round` every `ROUND_S` seconds."""

    checker: ConsistencyChecker
    users_per_s: int
    random: Random
    _position: int | None = None
    _scheduled: list[ScheduledCheck] = msgspec.field(default_factory=list)

    async def round(self) -> None:
        """Choose users of new events, schedule their checks, and run those that are due. Raises `StoreUnavailable`."""
        users, limit = self.checker.inspector.users, NEWEST if self._position is not None else 1
        newest = await users.recent(self._position or 0, limit)
        if self._position is not None:
            self._schedule(newest)
        self._position = newest[0].seq if newest else self._position or 0
        due = self._due()
        for start in range(0, len(due), AT_ONCE):
            await self._check(due[start : start + AT_ONCE])

    def _schedule(self, newest: Sequence[RecentEvent]) -> None:
        by_user = {item.user_id: item for item in reversed(newest)}  # the newest of each user
        chosen = self.random.sample(list(by_user.values()), min(self.users_per_s, len(by_user)))
        clock = self.checker.inspector.computation.clock
        now_ms, now = clock.now_ms(), clock.monotonic()
        for item in chosen:
            # Bounded, since rounds are a second apart and the wall clock may have been set meanwhile.
            age_s = min(max(0.0, (now_ms - item.received_at_ms) / 1000), ROUND_S)
            for after, delay_s in DELAYS:
                heapq.heappush(self._scheduled, ScheduledCheck(now - age_s + delay_s, after, item.user_id, item.seq))

    def _due(self) -> list[ScheduledCheck]:
        computation = self.checker.inspector.computation
        now = computation.clock.monotonic()
        due = []
        while self._scheduled and self._scheduled[0].due <= now:
            check = heapq.heappop(self._scheduled)
            if now - check.due > LATE_S:
                computation.metrics.consistency_checks.labels(check.after, "unchecked").inc()
            else:
                due.append(check)
        return due

    async def _check(self, checks: Sequence[ScheduledCheck]) -> None:
        metrics = self.checker.inspector.computation.metrics
        results = await self.checker.check(list(dict.fromkeys(check.user_id for check in checks)))
        by_user = {result.user_id: result for result in results}
        for check in checks:
            metrics.consistency_checks.labels(check.after, by_user[check.user_id].outcome).inc()
        for result in results:
            if result.untrue:
                check = next(check for check in checks if check.user_id == result.user_id)
                report(result, metrics, after=check.after, event_seq=check.seq)
        if repaired := await self.checker.repair(results):
            metrics.consistency_repairs.inc(repaired)
            log.warning("untrue_values_dropped", values=repaired)
