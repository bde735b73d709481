"""Computes each feature by itself for some stored users, to find out whether it works and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.features.clock import Clock
from app.features.registry import Registry, indices
from app.profiles.ports import ComputeRow, Source

SAMPLE = 20


class Trial(NamedTuple):
    """The result of trying one feature, given by its index.

    `us_per_user` is the time in microseconds; None if there was no user or the SQL exceeded the deadline (`overdue`).
    If the feature failed, `error` is the reason and `user_id` the user for whom it failed.
    """

    feature: int
    us_per_user: float | None
    user_id: str = ""
    error: str | None = None
    overdue: bool = False


async def try_features(
    source: Source, registry: Registry, mask: int, user_ids: Sequence[str], clock: Clock
) -> list[Trial]:
    """Compute each feature in the mask, one at a time, for the given users. Raises `StoreUnavailable`."""
    if not user_ids:
        return [Trial(index, None) for index in indices(mask)]
    # The first statement is parsed, which must not count as the cost of the first feature.
    await source.compute(clock.now_ms(), [ComputeRow(user_id, 0) for user_id in user_ids])
    return [await _try(source, registry, index, user_ids, clock) for index in indices(mask)]


async def _try(source: Source, registry: Registry, index: int, user_ids: Sequence[str], clock: Clock) -> Trial:
    started = clock.monotonic()
    snapshot = await source.compute(clock.now_ms(), [ComputeRow(user_id, 1 << index) for user_id in user_ids])
    took_us = (clock.monotonic() - started) * 1e6 / len(user_ids)
    for (place, _), error in snapshot.errors.items():
        overdue = bool(snapshot.overdue >> index & 1)
        return Trial(index, None if overdue else took_us, user_ids[place], error, overdue)
    for user_id, row in zip(user_ids, snapshot.rows, strict=True):
        _, wrong = registry[index].value_of(row[index])
        if wrong is not None:
            return Trial(index, took_us, user_id, wrong)
    return Trial(index, took_us)
