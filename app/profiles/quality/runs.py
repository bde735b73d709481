"""Runs of the data quality measurement, and the search for the users behind a number of a report.

An admin requests a run, and a worker carries it out as one job. At most one run is active. A run that a crash
interrupted is measured again from the beginning.

The search reads the cache now, and goes through all eligible users in bounded steps, one per request. Invariant: a step
leaves out a user only if the user's cached value is not in the wanted state when the step reads it. So the steps
together find every user whose value is in that state during the whole search.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple, Protocol

import msgspec

from app.errors import CacheUnavailable
from app.profiles.consistency.inspection import Inspection
from app.profiles.online.cache_protocol import NULL
from app.profiles.quality.measurement import DrawTimeout, QualityMeasurement
from app.profiles.quality.report import QualityReport
from app.telemetry import logger

KEPT = 10
PAGE = 200
MOST_SCANNED = 5_000
MOST_S = 1.0
log = logger("profiles.quality")
State = Literal["queued", "running", "completed", "failed"]
Sought = Literal["fresh", "missing", "stale", "null"]


class QualityRun(NamedTuple):
    """A stored run. `measured` is the number of users, 0 until the run is completed; `body` is the report as JSON."""

    id: int
    state: State
    requested_by: str
    requested_at_ms: int
    started_at_ms: int | None
    finished_at_ms: int | None
    measured: int
    body: str | None
    error: str | None

    @property
    def active(self) -> bool:
        return self.state in ("queued", "running")


class QualityRepository(Protocol):
    """Stores the runs of the measurement. Raises `StoreUnavailable`."""

    async def open(self, requested_by: str, now_ms: int) -> tuple[QualityRun, bool]:
        """The active run, and False; if there is none, a new run, and True."""

    async def newest(self, limit: int) -> list[QualityRun]:
        """Up to `limit` runs, newest first, without their reports."""

    async def newest_completed(self) -> QualityRun | None:
        """The newest run that has a report; None if there is none."""

    async def untouched(self, before_ms: int, after_ms: int) -> list[int]:
        """Ids of active runs that were last updated before `before_ms`, or after `after_ms`: by a clock that was
        ahead."""

    async def begin(self, run_id: int, now_ms: int) -> bool:
        """Mark a run as running; return False if the run has ended."""

    async def finish(
        self, run_id: int, state: State, now_ms: int, *, measured: int = 0, body: str | None = None, error: str = ""
    ) -> bool:
        """Set the final state of a run and delete all but the last `KEPT` runs; return False if the run had ended."""


class FoundUsers(NamedTuple):
    """The result of one step of a search. `users` has an inspection, with one cell, of each user found; None if the
    cache is unavailable. `scanned` users were examined. The next step begins after the user id `next_after`, which is
    None if all users have been examined."""

    at_ms: int
    users: list[Inspection] | None
    scanned: int
    next_after: str | None


class DataQuality(msgspec.Struct, frozen=True, kw_only=True):
    """Measures data quality in runs, and finds the users that a number of a report counts. `start` asks a worker to
    carry out a run; if that request is lost, a periodic job repeats it."""

    measurement: QualityMeasurement
    runs: QualityRepository
    start: Callable[[int], Awaitable[None]]

    async def carry_out(self, run_id: int, budget_s: float) -> None:
        """Measure data quality and store the report, unless the run has ended. The run fails if the users cannot be
        drawn in time: another attempt would not be faster. Raises `Unavailable` if it can be tried again later."""
        clock = self.measurement.inspector.computation.clock
        if not await self.runs.begin(run_id, clock.now_ms()):
            return
        try:
            report = await self.measurement.measure(budget_s)
        except DrawTimeout as error:
            log.error("quality_not_measured", run=run_id, error=str(error))
            await self.runs.finish(run_id, "failed", clock.now_ms(), error=str(error))
            return
        body = msgspec.json.encode(report).decode()
        await self.runs.finish(run_id, "completed", clock.now_ms(), measured=report.measured, body=body)
        log.info("quality_measured", run=run_id, eligible=report.eligible, measured=report.measured)

    async def find_users(self, feature: str, sought: Sought, after: str, limit: int) -> FoundUsers:
        """Find users whose cached value of a feature is in the state `sought`, in the order of their ids. Examine the
        eligible users with ids above `after`, until `limit` users are found, `MOST_SCANNED` users have been examined,
        or `MOST_S` seconds are over. Raises `UnknownFeature` or `StoreUnavailable`."""
        inspector = self.measurement.inspector
        registry, clock = inspector.computation.registry, inspector.computation.clock
        mask = registry.mask([feature])
        now_ms = clock.now_ms()
        deadline = clock.monotonic() + MOST_S
        found: list[Inspection] = []
        scanned = 0
        while scanned < MOST_SCANNED and clock.monotonic() <= deadline:
            page = await inspector.users.eligible(after, now_ms - registry.longest_window_ms(), PAGE)
            try:
                inspections = await inspector.freshness(page, mask) if page else []
            except CacheUnavailable:
                return FoundUsers(now_ms, None, scanned, None)
            for inspection in inspections:
                scanned += 1
                after = inspection.user_id
                (cell,) = inspection.cells
                null = cell.held is not None and cell.held.json == NULL
                if null if sought == "null" else cell.state == sought:
                    found.append(inspection)
                    if len(found) == limit:
                        return FoundUsers(now_ms, found, scanned, after)
            if len(page) < PAGE:
                return FoundUsers(now_ms, found, scanned, None)
        return FoundUsers(now_ms, found, scanned, after)


def readable_report(run: QualityRun) -> QualityReport | None:
    """The report of a completed run; None if a release wrote it in a form that this release cannot read."""
    try:
        return msgspec.json.decode(run.body or "", type=QualityReport)
    except msgspec.MsgspecError as error:
        log.warning("report_unreadable", run=run.id, error=str(error))
        return None
