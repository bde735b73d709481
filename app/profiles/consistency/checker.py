"""The consistency check: do the cached values of a user equal a recomputation?

A *violation* is a wrong cached value that `Inspector` confirmed. It is reported only if reads were allowed to serve
cached values before and after the inspection, and no event that is still being ingested explains it.

The monitor of a worker samples the users of recent events, at most `users_per_s` each second, and checks them 1 s,
1 min and 5 min after the event. If the worker stops, its scheduled checks are lost.
"""

import heapq
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, Literal, NamedTuple

import msgspec

from app.features.clock import rfc3339
from app.features.ids import user_hash
from app.profiles.consistency.inspection import InspectedCell, Inspection, Inspector
from app.profiles.online.cache_protocol import FeatureValue
from app.profiles.online.invalidation import Stale
from app.profiles.ports import EVERY_SLOT, RecentEvent
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
    """The result of checking one user. `wrong` has facts to log about each wrong value; empty unless `violation`."""

    user_id: str
    outcome: Outcome
    wrong: Sequence[dict[str, Any]] = ()


class ConsistencyChecker(msgspec.Struct, kw_only=True, eq=False):
    """Checks the cached values of users. `drop` deletes cached values and makes every process clear its local cache."""

    inspector: Inspector
    drop: Callable[[Stale], Awaitable[None]]

    async def check(self, user_ids: Sequence[str]) -> list[CheckResult]:
        """Compare cached values of some tens of users with the database; one result each. Raises `StoreUnavailable`."""
        if not self.inspector.filler.cache.available or EVERY_SLOT in await self.inspector.distrusted():
            return [CheckResult(user_id, "unchecked") for user_id in user_ids]
        return [await self._result(inspection) for inspection in await self.inspector.inspect(user_ids)]

    async def repair(self, results: Sequence[CheckResult]) -> int:
        """Delete from the cache the wrong values that a check found; return their number. Raises `StoreUnavailable`."""
        stale = {result.user_id: [facts["feature"] for facts in result.wrong] for result in results if result.wrong}
        if stale:
            await self.drop(stale)
        return sum(map(len, stale.values()))

    async def _result(self, inspection: Inspection) -> CheckResult:
        user_id = inspection.user_id
        if inspection.cache != "trusted":
            return CheckResult(user_id, "unchecked")
        wrong = [_facts(cell, cell.held, inspection) for cell in inspection.cells if cell.held and cell.fault]
        if not wrong:
            held = any(cell.held is not None for cell in inspection.cells)
            return CheckResult(user_id, "consistent" if held else "empty")
        oldest = min(facts["held_version"] for facts in wrong)
        only_stale = all(facts["fault"] == "stale" for facts in wrong)
        if only_stale and await self.inspector.users.any_unconsumed(user_id, oldest):
            return CheckResult(user_id, "pending")
        return CheckResult(user_id, "violation", wrong)


def _facts(cell: InspectedCell, held: FeatureValue, inspection: Inspection) -> dict[str, Any]:
    return {
        "feature": cell.entry.name,
        "fault": cell.fault,
        "held": held.json.decode(errors="replace"),
        "computed": cell.outcome.json.decode(errors="replace"),
        "held_version": held.version,
        "held_computed_at": rfc3339(held.computed_at_ms),
        "held_expires_at": rfc3339(held.expires_at_ms or 0),
        "fingerprint": held.fingerprint.decode(errors="replace"),
        "newest_events": dict(inspection.newest),
        "seen_at": rfc3339(inspection.at_ms),
    }


def report(result: CheckResult, metrics: Metrics, **context: object) -> None:
    """Count and log the wrong cached values of one user. The log has a hash instead of the user id, because the user
    may be erased later. The sequence numbers of the user's newest events, which are logged too, identify the user until
    these events are deleted."""
    for facts in result.wrong:
        metrics.consistency_violations.labels(facts["feature"], facts["fault"]).inc()
        log.error("consistency_violation", user=user_hash(result.user_id), **facts, **context)


class ConsistencyMonitor(msgspec.Struct, eq=False):
    """Checks the users of recent events after the `DELAYS`; `round` is called every `ROUND_S` seconds. `_scheduled` is
    a heap of checks: the time on the monotonic clock, the name of the delay, and the event."""

    checker: ConsistencyChecker
    users_per_s: int
    random: Random
    _position: int | None = None
    _scheduled: list[tuple[float, str, RecentEvent]] = msgspec.field(default_factory=list)

    async def round(self) -> None:
        """Choose users of new events, schedule their checks, and run those that are due. Raises `StoreUnavailable`."""
        first = self._position is None  # then only learn the position
        newest = await self.checker.inspector.users.recent(self._position or 0, 1 if first else NEWEST)
        if not first:
            self._schedule(newest)
        self._position = newest[0].seq if newest else self._position or 0
        due: list[tuple[str, RecentEvent]] = []
        computation = self.checker.inspector.computation
        now = computation.clock.monotonic()
        while self._scheduled and self._scheduled[0][0] <= now:
            at, after, event = heapq.heappop(self._scheduled)
            if now - at > LATE_S:
                computation.metrics.consistency_checks.labels(after, "unchecked").inc()
            else:
                due.append((after, event))
        for start in range(0, len(due), AT_ONCE):
            await self._check(due[start : start + AT_ONCE])

    def _schedule(self, newest: Sequence[RecentEvent]) -> None:
        newest = list({item.user_id: item for item in reversed(newest)}.values())  # the newest of each user
        clock = self.checker.inspector.computation.clock
        now_ms, now = clock.now_ms(), clock.monotonic()
        for item in self.random.sample(newest, min(self.users_per_s, len(newest))):
            # Bounded, since rounds are a second apart and the wall clock may have been set meanwhile.
            age_s = min(max(0.0, (now_ms - item.received_at_ms) / 1000), ROUND_S)
            for after, delay_s in DELAYS:
                heapq.heappush(self._scheduled, (now - age_s + delay_s, after, item))

    async def _check(self, checks: Sequence[tuple[str, RecentEvent]]) -> None:
        metrics = self.checker.inspector.computation.metrics
        by_user = {event.user_id: (after, event) for after, event in reversed(checks)}
        results = await self.checker.check(list(by_user))
        outcomes = {result.user_id: result.outcome for result in results}
        for after, event in checks:
            metrics.consistency_checks.labels(after, outcomes[event.user_id]).inc()
        for result in results:
            after, event = by_user[result.user_id]
            report(result, metrics, after=after, event_seq=event.seq)
        if repaired := await self.checker.repair(results):
            metrics.consistency_repairs.inc(repaired)
            log.warning("untrue_values_dropped", values=repaired)
