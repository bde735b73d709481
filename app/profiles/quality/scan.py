"""The survey: a walk over the users, page by page, that counts what the cache holds and what the values are.

One page is one look at its users in the log, one MGET, and one statement, the same that serves reads, which gives the
values as of the survey's beginning and as of `BEFORE_DAYS` days before. What has been counted is a `Survey`: it does
not grow with the users, and can be stored between two pages, and taken up again by another process.

Invariants: a page is counted whole or not at all. Every user that is eligible counts once, for each feature as fresh,
missing or stale. Once the cache is away, nothing is claimed of it, but the walk goes on, for values need none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from app.errors import CacheUnavailable
from app.features.clock import DAY_MS, Clock
from app.features.registry import Registry, as_dtype
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.inspection import CellFreshness, Inspector
from app.profiles.ports import ComputeRow, Member, Population, Snapshot, Source, Spans
from app.profiles.quality.sketch import Sketch
from app.profiles.trial import described
from app.telemetry import logger

BEFORE_DAYS = 7
# A longer statement holds a core for longer than the scheduler lets others wait; see `app.profiles.rebuild.rebuilder`.
PAGE = 16
# After a page, so many times what it took. With 3, the p99 of reads beside it was 1.2 to 1.5 times as long as without;
# with 1 and pages of 32, 1.7 to 1.9 times.
REST = 3.0
REST_WHEN_AWAITED = 1.0
TRIES = 5
TRY_AGAIN_S = 0.5
log = logger("profiles.quality")


class Figures(msgspec.Struct):
    """One feature, as far as the walk has come. `held` are the live values; `now` and `before` are computed."""

    fresh: int = 0
    missing: int = 0
    stale: int = 0
    failed: int = 0
    failure: str | None = None
    ages_ms: Sketch = msgspec.field(default_factory=Sketch)
    held: Sketch = msgspec.field(default_factory=Sketch)
    now: Sketch = msgspec.field(default_factory=Sketch)
    before: Sketch = msgspec.field(default_factory=Sketch)

    def fail(self, reason: str) -> None:
        """Count a value that could not be computed; the first reason is kept."""
        self.failed += 1
        self.failure = self.failure or reason


class Survey(msgspec.Struct):
    """A walk that began at `now_ms`, and has come to `position`, a user id. `fingerprints`: of the definitions."""

    now_ms: int
    before_ms: int
    history_from_ms: int | None
    total: int
    fingerprints: list[str]
    features: dict[str, Figures]
    position: str = ""
    walked: int = 0
    eligible: int = 0
    eligible_before: int = 0
    measured: bool = True


class Scanner:
    """Walks."""

    def __init__(
        self,
        *,
        inspector: Inspector,
        population: Population,
        source: Source,
        registry: Registry,
        clock: Clock,
        availability: FeatureAvailability | None = None,
        rest: float = REST,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._inspector = inspector
        self._population = population
        self._source = source
        self._registry = registry
        self._clock = clock
        self._availability = availability or FeatureAvailability(registry, clock)
        self._rest = rest
        self._pause = pause

    @property
    def fingerprints(self) -> list[str]:
        """What a survey must have been begun with to be continued here."""
        return [entry.fingerprint for entry in self._registry]

    async def begin(self) -> Survey:
        """A walk at its beginning. Raises `StoreUnavailable`."""
        now_ms = self._clock.now_ms()
        spans = self._spans(now_ms)
        return Survey(
            now_ms,
            spans.before_ms,
            await self._population.history_from_ms(),
            await self._population.count(spans),
            self.fingerprints,
            {entry.name: Figures() for entry in self._registry},
        )

    async def pages(self, survey: Survey) -> AsyncIterator[None]:
        """Walk on to the end; yields after each page, and rests before the next.

        Raises:
            StoreUnavailable: the database does not answer. The page counts for nothing, and may be tried again.
        """
        began = self._clock.monotonic()
        while await self._page(survey):
            yield
            await self._pause(self._rest * max(0.0, self._clock.monotonic() - began))
            began = self._clock.monotonic()

    async def _page(self, survey: Survey) -> bool:
        members = await self._population.members(survey.position, self._spans(survey.now_ms), PAGE)
        if not members:
            return False
        looks = await self._looks(survey, [member.user_id for member in members if member.now])
        withheld = self._availability.unavailable
        asked = self._asked(survey, members, self._registry.full_mask & ~withheld)
        snapshot = await self._source.compute(survey.now_ms, asked)
        for (place, index), error in snapshot.errors.items():
            if snapshot.overdue >> index & 1:
                self._availability.pause(index, asked[place].user_id, error, slow=True)
        # From here on nothing waits, so the page is counted whole.
        if looks is None:
            survey.measured = False
        for look in looks or ():
            self._count_look(survey, look)
        self._count_values(survey, asked, snapshot)
        survey.eligible += sum(member.now for member in members)
        survey.eligible_before += sum(member.before for member in members)
        survey.walked += len(members)
        survey.position = members[-1].user_id
        return True

    async def _looks(self, survey: Survey, user_ids: Sequence[str]) -> list[CellFreshness] | None:
        """What the cache holds; None once it is away. One that has answered before may be silent for a moment."""
        if not survey.measured:
            return None
        for attempt in range(1, TRIES + 1):
            try:
                return await self._inspector.freshness(user_ids)
            except CacheUnavailable as error:
                if attempt == TRIES or not survey.walked:
                    log.warning("survey_without_cache", error=str(error))
                    return None
                await self._pause(TRY_AGAIN_S)
        return None

    def _asked(self, survey: Survey, members: Sequence[Member], mask: int) -> list[ComputeRow]:
        now = [ComputeRow(member.user_id, mask, survey.now_ms) for member in members if member.now]
        return now + [ComputeRow(member.user_id, mask, survey.before_ms) for member in members if member.before]

    def _count_look(self, survey: Survey, look: CellFreshness) -> None:
        figures = survey.features[self._registry.names[look.feature]]
        if look.value is None:
            figures.missing += 1
            return
        if look.state == "stale":
            figures.stale += 1
        else:
            figures.fresh += 1
        figures.ages_ms.add(max(0, survey.now_ms - look.value.computed_at_ms))
        figures.held.add(msgspec.json.decode(look.value.json))

    def _count_values(self, survey: Survey, asked: Sequence[ComputeRow], snapshot: Snapshot) -> None:
        for index, entry in enumerate(self._registry):
            figures = survey.features[entry.name]
            for place, (row, raws) in enumerate(zip(asked, snapshot.rows, strict=True)):
                if not row.mask >> index & 1:
                    figures.fail(self._availability.reason(index))
                    continue
                raw = raws[index]
                value = entry.default if raw is None else as_dtype(entry.dtype, raw)
                if (place, index) in snapshot.errors:
                    figures.fail(snapshot.errors[place, index])
                elif raw is not None and value is None:
                    figures.fail(described(raw, entry.dtype))
                else:
                    (figures.now if row.now_ms == survey.now_ms else figures.before).add(value)

    def _spans(self, now_ms: int) -> Spans:
        """Users are eligible if they have an event within the longest window."""
        window_ms = self._registry.longest_window_ms()
        before_ms = now_ms - BEFORE_DAYS * DAY_MS
        return Spans(now_ms - window_ms, before_ms - window_ms, before_ms)
