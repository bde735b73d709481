"""Measures data quality for users drawn at random: the freshness of their cached values, and their distributions.

For each page of users, the inspector compares the cache with the log. Then the users' values are computed as of the
measurement and as of `BEFORE_DAYS` days before it, by the SQL statement that also answers reads. The users come in
random order, so if time runs out, the users measured until then are a smaller uniform sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random

import msgspec

from app.errors import CacheUnavailable
from app.features.clock import DAY_MS, Clock
from app.features.registry import Registry
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.inspection import CellFreshness, Inspector
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, NewestEvents, Snapshot, Source
from app.profiles.quality.report import Figures, QualityReport, UserSample, report
from app.telemetry import logger

BEFORE_DAYS = 7
SAMPLE = 20_000
# A larger statement holds a core for longer than the scheduler's time slice; see `app.profiles.rebuild.rebuilder`.
PAGE = 16
DRAW_PAGE = 500
# After each page, the measurement pauses for up to this multiple of the page's time, if the budget allows. With 3, the
# p99 of concurrent reads is 1.2 to 1.5 times that without a measurement; with 1, it is 1.8 times.
REST = 3.0
PACE = 0.9  # the share of the budget to plan with; the rest is for slow pages
BUDGET_S = 30.0
TRIES = 5
TRY_AGAIN_S = 0.5
log = logger("profiles.quality")


class QualityMeasurement:
    """Measures data quality, one measurement at a time. `sample` is the largest number of users that are drawn for each
    of the two moments that are compared."""

    def __init__(
        self,
        *,
        inspector: Inspector,
        users: NewestEvents,
        source: Source,
        registry: Registry,
        availability: FeatureAvailability,
        clock: Clock,
        random: Random,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.sample = SAMPLE
        self._inspector = inspector
        self._users = users
        self._source = source
        self._registry = registry
        self._availability = availability
        self._clock = clock
        self._random = random
        self._pause = pause
        self._turn = asyncio.Lock()

    async def measure(self, budget_s: float = BUDGET_S) -> QualityReport:
        """Draw users and measure as many as `budget_s` seconds allow, at least one page of `PAGE` users. Raises
        `StoreUnavailable`."""
        async with self._turn:
            begun = self._clock.monotonic()
            sample = await self._draw()
            users = max(len(sample.now), len(sample.before))
            for start in range(0, users, PAGE):
                page_begun = self._clock.monotonic()
                if start and page_begun - begun > budget_s:
                    del sample.now[start:], sample.before[start:]
                    break
                await self._page(sample, start)
                ended = self._clock.monotonic()
                spare_s = PACE * budget_s * (start + PAGE) / users - (ended - begun)
                await self._pause(max(0.0, min(REST * (ended - page_begun), spare_s)))
            return report(sample, self._registry, self._clock.now_ms())

    async def _draw(self) -> UserSample:
        """Draw users for two moments, now and `BEFORE_DAYS` ago, from those with an event in the longest window of any
        feature before the moment."""
        now_ms = self._clock.now_ms()
        before_ms, window_ms = now_ms - BEFORE_DAYS * DAY_MS, self._registry.longest_window_ms()
        spans = ((now_ms - window_ms, END_OF_TIME_MS), (before_ms - window_ms, before_ms))
        (eligible, now), (eligible_before, before) = [
            await draw(self._users, span, self.sample, self._random, self._pause, self._clock) for span in spans
        ]
        figures = {entry.name: Figures() for entry in self._registry}
        oldest_ms = await self._users.oldest_event_ms()
        return UserSample(now_ms, before_ms, oldest_ms, eligible, now, eligible_before, before, figures)

    async def _page(self, sample: UserSample, start: int) -> None:
        now, before = sample.now[start : start + PAGE], sample.before[start : start + PAGE]
        if sample.cache_answers:
            await self._count_held(sample, now, first=start == 0)
        mask = self._registry.full_mask & ~self._availability.unavailable
        asked = [ComputeRow(user_id, mask, sample.now_ms) for user_id in now]
        asked += [ComputeRow(user_id, mask, sample.before_ms) for user_id in before]
        snapshot = await self._source.compute(sample.now_ms, asked)
        for (place, index), error in snapshot.errors.items():
            if snapshot.overdue >> index & 1:
                self._availability.pause(index, asked[place].user_id, error, slow=True)
        self._count_values(sample, asked, snapshot, len(now))

    async def _count_held(self, sample: UserSample, user_ids: Sequence[str], *, first: bool) -> None:
        """Count the cached values of users by state, age and value. If the cache is unavailable, try again up to
        `TRIES` times, but not for the first page."""
        for attempt in range(1, TRIES + 1):
            try:
                cells = await self._inspector.freshness(user_ids)
            except CacheUnavailable as error:
                if first or attempt == TRIES:
                    log.warning("measured_without_cache", error=str(error))
                    sample.cache_answers = False
                    return
                await self._pause(TRY_AGAIN_S)
            else:
                for cell in cells:
                    _count_cell(sample.figures[self._registry.names[cell.feature]], cell, sample.now_ms)
                return

    def _count_values(self, sample: UserSample, asked: Sequence[ComputeRow], snapshot: Snapshot, now: int) -> None:
        """Count computed values: the first `now` rows are as of the measurement, the others as of `before_ms`."""
        for index, entry in enumerate(self._registry):
            figures = sample.figures[entry.name]
            for place, (row, raws) in enumerate(zip(asked, snapshot.rows, strict=True)):
                if not row.mask >> index & 1:
                    figures.fail(self._availability.reason(index))
                    continue
                value, error = entry.value_of(raws[index])
                error = snapshot.errors.get((place, index), error)
                if error is not None:
                    figures.fail(error)
                else:
                    (figures.now if place < now else figures.before)[value] += 1


async def draw(
    users: NewestEvents,
    span: tuple[int, int],
    size: int,
    random: Random,
    pause: Callable[[float], Awaitable[None]],
    clock: Clock,
) -> tuple[int, list[str]]:
    """Draw up to `size` users at random from the users with an event in `span`, (first, last) in milliseconds.

    Returns the number of users with an event in the span, and the drawn users, a uniform sample in random order.

    J. S. Vitter's algorithm R (Random sampling with a reservoir, 1985), page by page, with a pause after each page. One
    statement that ranks all users took 0.2 s for 100,000 users, and reads on a busy machine waited for it.
    """
    drawn: list[str] = []
    seen, after, began = 0, "", clock.monotonic()
    while page := await users.eligible(after, span[0], DRAW_PAGE, span[1]):
        for user_id in page:
            seen += 1
            if len(drawn) < size:
                drawn.append(user_id)
            elif (place := random.randrange(seen)) < size:
                drawn[place] = user_id
        after = page[-1]
        await pause(max(0.0, clock.monotonic() - began))
        began = clock.monotonic()
    random.shuffle(drawn)
    return seen, drawn


def _count_cell(figures: Figures, cell: CellFreshness, now_ms: int) -> None:
    figures.states[cell.state] += 1
    if cell.value is not None:
        figures.ages_ms.append(max(0, now_ms - cell.value.computed_at_ms))
        figures.held[msgspec.json.decode(cell.value.json)] += 1
