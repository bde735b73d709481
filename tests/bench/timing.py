"""Comparing two ways of doing the same thing: alternating, several rounds, medians, and their ratio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

ROUNDS = 7

Work = Callable[[], Awaitable[object]]


class Comparison(NamedTuple):
    """`ratio` is ours over the reference, both medians of one unit of work in seconds; below 1 ours is faster.

    `at_most` is the floor that the project set itself.
    """

    name: str
    reference: str
    reference_s: float
    ours_s: float
    at_most: float | None = None

    @property
    def ratio(self) -> float:
        """Ours over the reference."""
        return self.ours_s / self.reference_s


async def compare(
    name: str,
    reference_name: str,
    reference: Work,
    ours: Work,
    *,
    repeat: int,
    units: int = 1,
    at_most: float | None = None,
) -> Comparison:
    """Run both in turn. `repeat` times a round; `units` of work are in one call."""
    await reference()
    await ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for work, taken in zip((reference, ours), times, strict=True):
            started = perf_counter()
            for _ in range(repeat):
                await work()
            taken.append((perf_counter() - started) / repeat / units)
    return Comparison(name, reference_name, median(times[0]), median(times[1]), at_most)
