"""The consistency monitor: a worker checks the users of some recent events 1 s, 1 min and 5 min after each event.

Each second, the monitor chooses at most `users_per_s` users at random from the newest events. This also limits the
number of scheduled checks. If the worker stops, its scheduled checks are lost: the monitor only samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import msgspec

from app.features.clock import Clock
from app.profiles.consistency.checker import ConsistencyChecker, report
from app.profiles.ports import RecentEvent
from app.telemetry import Metrics, logger

DELAYS = (("1s", 1.0), ("1min", 60.0), ("5min", 300.0))
ROUND_S = 1.0
NEWEST = 200
AT_ONCE = 16
# A check that is later than this would not measure its delay: the machine slept, or the database did not answer.
LATE_S = 10.0
log = logger("profiles.consistency")


class ScheduledCheck(NamedTuple):
    """A check of a user, scheduled for the time `due` on the monotonic clock, in seconds. `seq` is the sequence number
    of the event that led to it. `after` names the delay since the event, such as `1min`."""

    due: float
    after: str
    user_id: str
    seq: int


class ConsistencyMonitor(msgspec.Struct, kw_only=True, eq=False):
    """Samples users with recent events, and checks each of them after every delay in `DELAYS`. Each worker has one
    instance and calls its `round` every `ROUND_S` seconds."""

    checker: ConsistencyChecker
    users_per_s: int
    random: Random
    clock: Clock
    metrics: Metrics
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
        now_ms, now = self.clock.now_ms(), self.clock.monotonic()
        for item in chosen:
            # Bounded, since rounds are a second apart and the wall clock may have been set meanwhile.
            age_s = min(max(0.0, (now_ms - item.received_at_ms) / 1000), ROUND_S)
            for after, delay_s in DELAYS:
                heapq.heappush(self._scheduled, ScheduledCheck(now - age_s + delay_s, after, item.user_id, item.seq))

    def _due(self) -> list[ScheduledCheck]:
        now = self.clock.monotonic()
        due = []
        while self._scheduled and self._scheduled[0].due <= now:
            check = heapq.heappop(self._scheduled)
            if now - check.due > LATE_S:
                self.metrics.consistency_checks.labels(check.after, "unchecked").inc()
            else:
                due.append(check)
        return due

    async def _check(self, checks: Sequence[ScheduledCheck]) -> None:
        results = await self.checker.check(list(dict.fromkeys(check.user_id for check in checks)))
        by_user = {result.user_id: result for result in results}
        for check in checks:
            self.metrics.consistency_checks.labels(check.after, by_user[check.user_id].outcome).inc()
        for result in results:
            if result.untrue:
                check = next(check for check in checks if check.user_id == result.user_id)
                report(result, self.metrics, after=check.after, event_seq=check.seq)
        if repaired := await self.checker.repair(results):
            self.metrics.consistency_repairs.inc(repaired)
            log.warning("untrue_values_dropped", values=repaired)
