"""Tries definitions of features on stored users before they serve: errors, cost, and how two definitions differ."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import NamedTuple

import msgspec

from app.features.clock import Clock
from app.features.registry import Feature, Registry, Scalar, indices
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, Source
from app.profiles.quality.drift import Band, CommonBin, band, common_bins, numbers, psi, quantiles, too_few
from app.profiles.quality.measurement import draw

SAMPLE = 20
PAGE = 128
EXAMPLES = 5


class Trial(NamedTuple):
    """The result of trying the feature with the index `feature`. `us_per_user`: microseconds; None if there was no user
    or the SQL exceeded the deadline. `error`: why the feature failed for the user `user_id`."""

    feature: int
    us_per_user: float | None
    user_id: str = ""
    error: str | None = None


async def try_features(
    source: Source, registry: Registry, mask: int, user_ids: Sequence[str], clock: Clock
) -> list[Trial]:
    """Compute each feature in the mask by itself for the given users. Raises `StoreUnavailable`."""
    if not user_ids:
        return [Trial(index, None) for index in indices(mask)]
    # The first statement is parsed, which must not count as the cost of the first feature.
    await source.compute(clock.now_ms(), [ComputeRow(user_id, 0) for user_id in user_ids])
    return [await _try(source, registry, index, user_ids, clock) for index in indices(mask)]


async def _try(source: Source, registry: Registry, index: int, user_ids: Sequence[str], clock: Clock) -> Trial:
    started = clock.monotonic()
    snapshot = await source.compute(clock.now_ms(), [ComputeRow(user_id, 1 << index) for user_id in user_ids])
    took_us = (clock.monotonic() - started) * 1e6 / len(user_ids)
    for place, user_id in enumerate(user_ids):
        _, wrong = registry[index].value_of(snapshot.rows[place][index])
        if (error := snapshot.errors.get((place, index), wrong)) is not None:
            return Trial(index, None if snapshot.overdue >> index & 1 else took_us, user_id, error)
    return Trial(index, took_us)


class Side(msgspec.Struct):
    """The values of one definition: how many are null, how many failed, and the quartiles of the numbers, if any."""

    fingerprint: str
    nulls: int
    failed: int
    quartiles: list[float | None]


class ChangedUser(msgspec.Struct):
    user_id: str
    before: Scalar
    after: Scalar


class Difference(msgspec.Struct, kw_only=True):
    """The result of comparing two definitions of a feature for the same users. `psi`: the population stability index
    between the two sets of values; if it is None, `why_no_psi` is the reason."""

    feature: str
    users: int
    changed: int
    changed_share: float
    before: Side
    after: Side
    psi: float | None
    band: Band | None
    why_no_psi: str | None
    bins: list[CommonBin]
    examples: list[ChangedUser]


async def compare(
    before: Feature,
    after: Feature,
    source_of: Callable[[Registry], Source],
    eligible: Callable[[str, int, int, int], Awaitable[list[str]]],
    *,
    count: int,
    random: Random,
    clock: Clock,
    tell: Callable[[int], object],
) -> Difference:
    """Compute both definitions for up to `count` users, drawn at random from those with an event within the longer of
    the two windows, and compare the values. `eligible`: see `UserQueries.eligible`. `tell` is called with the number of
    users done so far. Raises `StoreUnavailable`."""
    now_ms = clock.now_ms()
    since_ms = now_ms - max(before.window_ms, after.window_ms)
    _, chosen = await draw(eligible, (since_ms, END_OF_TIME_MS), count, random, asyncio.sleep, clock)
    sides = [_Definition(entry, source_of(Registry([entry]))) for entry in (before, after)]
    changed: list[ChangedUser] = []
    for start in range(0, len(chosen), PAGE):
        page = chosen[start : start + PAGE]
        old, new = [await side.compute(page, now_ms) for side in sides]
        changed += [ChangedUser(*row) for row in zip(page, old, new, strict=True) if row[1] != row[2]]
        tell(start + len(page))
    if before.dtype == after.dtype:
        bins = common_bins(after.dtype, sides[1].counts, sides[0].counts)
        why_not = too_few(bins)
    else:
        bins, why_not = [], f"the dtype changes from {before.dtype} to {after.dtype}"
    figure = None if why_not else round(psi(bins), 4)
    return Difference(
        feature=after.name,
        users=len(chosen),
        changed=len(changed),
        changed_share=len(changed) / max(1, len(chosen)),
        before=sides[0].side(),
        after=sides[1].side(),
        psi=figure,
        band=None if figure is None else band(figure),
        why_no_psi=why_not,
        bins=bins,
        examples=changed[:EXAMPLES],
    )


class _Definition(msgspec.Struct):
    """Computes values of one definition, and counts them and the failures."""

    entry: Feature
    source: Source
    failed: int = 0
    counts: Counter[Scalar] = msgspec.field(default_factory=Counter)

    async def compute(self, user_ids: list[str], now_ms: int) -> list[Scalar]:
        snapshot = await self.source.compute(now_ms, [ComputeRow(user_id, 1) for user_id in user_ids])
        values: list[Scalar] = []
        for place, row in enumerate(snapshot.rows):
            value, error = self.entry.value_of(row[0])
            if error is not None or (place, 0) in snapshot.errors:
                self.failed += 1
                value = None
            else:
                self.counts[value] += 1
            values.append(value)
        return values

    def side(self) -> Side:
        quartiles = quantiles(numbers(self.counts).elements(), (0.25, 0.5, 0.75))
        return Side(self.entry.fingerprint, self.counts[None], self.failed, quartiles)
