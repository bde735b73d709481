"""A trial computes each feature alone for some stored users, to find out whether it works and how long it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app.features.clock import Clock
from app.features.registry import Registry, indices
from app.profiles.ports import ComputeRow, Source

SAMPLE = 20


class Trial(NamedTuple):
    """The result for one feature, given by its index. `user_id` is the user for whom it failed with `error`.

    `us_per_user` is in microseconds; None if there was no user or the SQL exceeded the deadline (`overdue`).
    """

    feature: int
    us_per_user: float | None
    user_id: str = ""
    error: str | None = None
    overdue: bool = False


async def try_features(
    source: Source, registry: Registry, mask: int, user_ids: Sequence[str], clock: Clock
) -> list[Trial]:
    """Compute each feature in the mask for each user. Raises `StoreUnavailable`."""
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


def costs(trials: Iterable[Trial]) -> dict[int, float]:
    """Microseconds a user, by feature index, of the trials that have a figure."""
    return {trial.feature: trial.us_per_user for trial in trials if trial.us_per_user is not None}
