"""Measures data quality for users drawn at random, and searches for users whose cached value has a given state.

For each page of users, the inspector compares the cache with the log. Then the users' values are computed as of the
measurement and as of `BEFORE_DAYS` days before it. The users come in random order, so if time runs out, the users
measured until then are a smaller uniform sample.

The search reads the cache now, and goes through all eligible users in bounded steps, one per request. Invariant: a step
leaves out a user only if the user's cached value is not in the wanted state when the step reads it. So the steps
together find every user whose value is in that state during the whole search.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import Literal, NamedTuple

import msgspec

from app.errors import Unavailable
from app.features.clock import DAY_MS, Clock
from app.profiles.consistency.inspection import Inspection, Inspector
from app.profiles.online.cache_protocol import NULL
from app.profiles.ports import END_OF_TIME_MS, ComputeRow
from app.profiles.quality.report import Figures, QualityReport, QualityRepository, UserSample, report
from app.telemetry import logger

BEFORE_DAYS = 7
SAMPLE = 20_000
# Reads wait for a step: see `app/README.md`. With 4 users, a run has not enough time to pause between the steps.
PAGE = 8
DRAW_PAGE = 100
# After each step, the measurement pauses for up to this multiple of the step's time, if the budget allows.
REST = 3.0
PACE = 0.9  # the share of the budget to plan with; the rest is for slow steps
DRAW_SHARE = 0.4  # of the budget; after it, the draw does not pause any more, so that time is left to measure
BUDGET_S = 30.0
SEARCH_PAGE, MOST_SCANNED, MOST_S = 200, 5_000, 1.0
TRIES = 5
TRY_AGAIN_S = 0.5
Sought = Literal["fresh", "missing", "stale", "null"]
log = logger("profiles.quality")


class DrawTimeout(Unavailable):
    """Drawing the users took all the time of a measurement."""


class FoundUsers(NamedTuple):
    """The result of one step of a search. `users` has an inspection, with one cell, of each user found; None if the
    cache is unavailable. `scanned` users were examined. The next step begins after the user id `next_after`, which is
    None if all users have been examined."""

    at_ms: int
    users: list[Inspection] | None
    scanned: int
    next_after: str | None


class DataQuality(msgspec.Struct, kw_only=True, eq=False):
    """Measures the features of up to `sample` users now, and of up to `sample` users as of `BEFORE_DAYS` days ago. Only
    one measurement runs at a time."""

    inspector: Inspector
    random: Random
    runs: QualityRepository
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    sample: int = SAMPLE
    _turn: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)

    async def measure(self, budget_s: float = BUDGET_S) -> QualityReport:
        """Draw users and measure as many as `budget_s` seconds allow, at least one page. Raises `DrawTimeout` if the
        time was up before the users were drawn, or `StoreUnavailable`."""
        registry, clock = self.inspector.computation.registry, self.inspector.computation.clock
        async with self._turn:
            begun = clock.monotonic()
            sample = await self._draw(begun + DRAW_SHARE * budget_s, begun + budget_s)
            drawn = clock.monotonic()
            left_s = PACE * (begun + budget_s - drawn)
            users = max(len(sample.now), len(sample.before))
            for start in range(0, users, PAGE):
                if start and clock.monotonic() - begun > budget_s:
                    del sample.now[start:], sample.before[start:]
                    break
                for count in (self._count_held, self._count_values):
                    step_begun = clock.monotonic()
                    await count(sample, start)
                    ended = clock.monotonic()
                    spare_s = left_s * (start + PAGE) / users - (ended - drawn)
                    await self.pause(max(0.0, min(REST * (ended - step_begun), spare_s)))
            return report(sample, registry, clock.now_ms())

    async def _draw(self, rest_until: float, until: float) -> UserSample:
        """Draw one sample of users for now, and one for `BEFORE_DAYS` days ago, from the users with an event in the
        longest window before that time. For `rest_until` and `until`, see `draw`."""
        users, computation = self.inspector.users, self.inspector.computation
        registry, clock = computation.registry, computation.clock
        now_ms = clock.now_ms()
        before_ms, window_ms = now_ms - BEFORE_DAYS * DAY_MS, registry.longest_window_ms()
        spans = ((now_ms - window_ms, END_OF_TIME_MS), (before_ms - window_ms, before_ms))
        (eligible, now), (eligible_before, before) = [
            await draw(users.eligible, span, self.sample, self.random, self.pause, clock, rest_until, until)
            for span in spans
        ]
        figures = {entry.name: Figures() for entry in registry}
        oldest_ms = await users.oldest_event_ms()
        return UserSample(now_ms, before_ms, oldest_ms, eligible, now, eligible_before, before, figures)

    async def _count_held(self, sample: UserSample, start: int) -> None:
        """Count the cached values of `PAGE` users of `sample.now`, from index `start`, by state, age and value. If
        the cache is unavailable, give up at once on the first page, and after `TRIES` attempts on later ones."""
        if not sample.cache_answers:
            return
        for attempt in range(TRIES if start else 1):
            if attempt:
                await self.pause(TRY_AGAIN_S)
            inspections = await self.inspector.inspect(sample.now[start : start + PAGE], compute=False)
            if all(inspection.cache != "away" for inspection in inspections):
                break
        else:
            log.warning("measured_without_cache", error="no cache is set, or it does not answer")
            sample.cache_answers = False
            return
        for cell in (cell for inspection in inspections for cell in inspection.cells):
            figures = sample.figures[cell.entry.name]
            figures.states[cell.state] += 1
            if cell.held is not None:
                figures.ages_ms.append(max(0, sample.now_ms - cell.held.computed_at_ms))
                figures.held[msgspec.json.decode(cell.held.json)] += 1

    async def _count_values(self, sample: UserSample, start: int) -> None:
        """Compute and count values for a page of the sample, which begins at index `start`. The values of the users
        `now` are computed as of `now_ms`, those of the users `before` as of `before_ms`."""
        registry = self.inspector.computation.registry
        page = slice(start, start + PAGE)
        asked = [ComputeRow(user_id, registry.full_mask, sample.now_ms) for user_id in sample.now[page]]
        now = len(asked)
        asked += [ComputeRow(user_id, registry.full_mask, sample.before_ms) for user_id in sample.before[page]]
        for place, profile in enumerate(await self.inspector.computation.compute(asked)):
            for index, value in profile.items():
                figures = sample.figures[registry[index].name]
                if value.error is not None:
                    figures.fail(value.error)
                else:
                    (figures.now if place < now else figures.before)[msgspec.json.decode(value.json)] += 1

    async def carry_out(self, run_id: int, budget_s: float) -> None:
        """Measure data quality and store the report, unless the run has ended or another worker measures. The run fails
        if the users cannot be drawn in time: another attempt would not be faster. Raises `Unavailable`."""
        clock = self.inspector.computation.clock
        if not await self.runs.begin(run_id, clock.now_ms()):
            return
        try:
            found = await self.measure(budget_s)
        except DrawTimeout as error:
            log.error("quality_not_measured", run=run_id, error=str(error))
            await self.runs.finish(run_id, "failed", clock.now_ms(), error=str(error))
            return
        except BaseException:
            with suppress(Unavailable):  # which would hide a cancellation; the run is begun again after `STALE_MS`
                await self.runs.release(run_id)
            raise
        body = msgspec.json.encode(found).decode()
        await self.runs.finish(run_id, "completed", clock.now_ms(), measured=found.measured, body=body)
        log.info("quality_measured", run=run_id, eligible=found.eligible, measured=found.measured)

    async def find_users(self, feature: str, sought: Sought, after: str, limit: int) -> FoundUsers:
        """Find users whose cached value of a feature is in the state `sought`, in the order of their ids. Examine the
        eligible users with ids above `after`, until `limit` users are found, `MOST_SCANNED` users have been examined,
        or `MOST_S` seconds are over. Raises `UnknownFeature` or `StoreUnavailable`."""
        inspector = self.inspector
        registry, clock = inspector.computation.registry, inspector.computation.clock
        mask = registry.mask([feature])
        now_ms = clock.now_ms()
        deadline = clock.monotonic() + MOST_S
        found: list[Inspection] = []
        scanned = 0
        while scanned < MOST_SCANNED and clock.monotonic() <= deadline:
            page = await inspector.users.eligible(after, now_ms - registry.longest_window_ms(), SEARCH_PAGE)
            inspections = await inspector.inspect(page, mask, compute=False)
            if any(inspection.cache == "away" for inspection in inspections):
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
            if len(page) < SEARCH_PAGE:
                return FoundUsers(now_ms, found, scanned, None)
        return FoundUsers(now_ms, found, scanned, after)


async def draw(
    eligible: Callable[[str, int, int, int], Awaitable[list[str]]],
    span: tuple[int, int],
    size: int,
    random: Random,
    pause: Callable[[float], Awaitable[None]],
    clock: Clock,
    rest_until: float = math.inf,
    until: float = math.inf,
) -> tuple[int, list[str]]:
    """Draw up to `size` users at random from the users with an event in `span`, (first, last) in milliseconds. Return
    the number of these users, and the drawn ones, a uniform sample in random order.

    `eligible`: see `UserQueries.eligible`. Uses J. S. Vitter's algorithm R (Random sampling with a reservoir, 1985),
    page by page. After each page there is a pause, `REST` times as long as reading the page took. No pause extends
    beyond the monotonic time `rest_until`. Raises `DrawTimeout` if a page ends after the monotonic time `until`.
    """
    drawn: list[str] = []
    seen, after, began = 0, "", clock.monotonic()
    while page := await eligible(after, span[0], DRAW_PAGE, span[1]):
        for user_id in page:
            seen += 1
            if len(drawn) < size:
                drawn.append(user_id)
            elif (place := random.randrange(seen)) < size:
                drawn[place] = user_id
        after = page[-1]
        ended = clock.monotonic()
        if ended > until:  # a part of the users would be no uniform sample
            raise DrawTimeout(f"the users could not be drawn in time: {seen:,} had been read when the time was up")
        await pause(max(0.0, min(REST * (ended - began), rest_until - ended)))
        began = clock.monotonic()
    random.shuffle(drawn)
    return seen, drawn
