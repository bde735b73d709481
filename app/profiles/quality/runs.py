"""Runs of the survey as bookkeeping: one at a time, resumable after a crash, the last few reports kept.

A worker carries a run out in pieces of limited time. After each piece the survey itself is stored, so whoever takes the
run up goes on from there; what a crash cost is walked again. A survey of which nobody has heard for `FORGOTTEN_MS`, or
that another release began with other definitions, is begun anew: its earlier figures would mean something else by now.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import msgspec

from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.quality.report import QualityReport, report
from app.profiles.quality.scan import Scanner, Survey
from app.telemetry import logger

KEPT = 10
TELL_EVERY_S = 0.5
FORGOTTEN_MS = 5 * 60_000
ACTIVE = ("queued", "running")
log = logger("profiles.quality")
State = Literal["queued", "running", "completed", "failed"]


class QualityRun(NamedTuple):
    """One run. `body` is the survey while it runs, and then the report; `total` is not known before it begins."""

    id: int
    state: State
    requested_by: str
    requested_at_ms: int
    started_at_ms: int | None
    touched_at_ms: int
    finished_at_ms: int | None
    done: int
    total: int | None
    body: str | None
    error: str | None

    @property
    def active(self) -> bool:
        """Whether it is queued or running."""
        return self.state in ACTIVE


class QualityRepository(Protocol):
    """Where runs are kept. Raises `StoreUnavailable`."""

    async def open(self, requested_by: str, now_ms: int) -> tuple[QualityRun, bool]:
        """The run that is active, and whether it is a new one."""
        ...

    async def get(self, run_id: int) -> QualityRun | None:
        """One run."""
        ...

    async def newest(self, limit: int) -> list[QualityRun]:
        """Newest first, without their bodies."""
        ...

    async def newest_completed(self) -> QualityRun | None:
        """The newest one that has a report."""
        ...

    async def untouched(self, before_ms: int, after_ms: int) -> list[int]:
        """Active runs that were touched last before a moment, or, as the clock has it, after another in the future."""
        ...

    async def advance(self, run_id: int, done: int, total: int, now_ms: int, body: str | None) -> bool:
        """Record progress, and the survey where it is given; False where the run has ended."""
        ...

    async def finish(self, run_id: int, state: State, now_ms: int, body: str | None, error: str | None) -> bool:
        """End an active run, and forget all but the last `KEPT`; False where it had ended before."""
        ...


class QualityRunner:
    """Carries runs out."""

    def __init__(self, *, book: QualityRepository, surveyor: Scanner, registry: Registry, clock: Clock) -> None:
        self._book = book
        self._surveyor = surveyor
        self._registry = registry
        self._clock = clock

    async def run(self, run_id: int, budget_s: float) -> bool:
        """Go on with a run for about `budget_s` seconds; False where there is more to do.

        Raises:
            Unavailable: try again later; the run goes on from where it was stored.
        """
        run = await self._book.get(run_id)
        if run is None or not run.active:
            return True
        survey = self._stored(run) or await self._surveyor.begin()
        if not await self._tell(run_id, survey, whole=True):
            return True
        told = began = self._clock.monotonic()
        async for _ in self._surveyor.pages(survey):
            moment = self._clock.monotonic()
            over = moment - began > budget_s
            if over or moment - told > TELL_EVERY_S:
                told = moment
                if not await self._tell(run_id, survey, whole=over):
                    return True
            if over:
                return False
        now_ms = self._clock.now_ms()
        body = msgspec.json.encode(report(survey, self._registry, now_ms)).decode()
        await self._book.finish(run_id, "completed", now_ms, body, None)
        log.info("quality_measured", run=run_id, eligible=survey.eligible, cache=survey.measured)
        return True

    async def _tell(self, run_id: int, survey: Survey, *, whole: bool) -> bool:
        body = msgspec.json.encode(survey).decode() if whole else None
        return await self._book.advance(run_id, survey.walked, survey.total, self._clock.now_ms(), body)

    def _stored(self, run: QualityRun) -> Survey | None:
        if run.body is None or self._clock.now_ms() - run.touched_at_ms > FORGOTTEN_MS:
            return None
        survey = msgspec.json.decode(run.body, type=Survey)
        return survey if survey.fingerprints == self._surveyor.fingerprints else None


def readable_report(run: QualityRun) -> QualityReport | None:
    """The report of a completed run; None where another release wrote it, and this one cannot read it."""
    try:
        return msgspec.json.decode(run.body or "", type=QualityReport)
    except msgspec.MsgspecError as error:
        log.warning("report_unreadable", run=run.id, error=str(error))
        return None
