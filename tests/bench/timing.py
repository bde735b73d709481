"""What a measurement yields: two ways of doing the same thing and their ratio, or a figure over a sweep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Literal, NamedTuple

ROUNDS = 7

Work = Callable[[], Awaitable[object]]


class Comparison(NamedTuple):
    """Two medians of the same unit of work, in seconds or in bytes: less is better.

    `at_most` is the floor that the project set itself for `ratio`.
    """

    name: str
    against: str
    reference: float
    ours: float
    at_most: float | None = None
    unit: Literal["s", "B"] = "s"

    @property
    def ratio(self) -> float:
        """Ours over the reference; below 1 ours is better."""
        return self.ours / self.reference


class Curve(NamedTuple):
    """Figures over a sweep: one line for each of `series`, each with a value for each of `at`."""

    name: str
    x: str
    y: str
    at: Sequence[float]
    series: Mapping[str, Sequence[float]]


Result = Comparison | Curve


async def compare(
    name: str,
    against: str,
    reference: Work,
    ours: Work,
    *,
    repeat: int,
    units: int = 1,
    at_most: float | None = None,
    rounds: int = ROUNDS,
) -> Comparison:
    """Run both in turn. `repeat` times a round; `units` of work are in one call."""
    await reference()
    await ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, taken in zip((reference, ours), times, strict=True):
            started = perf_counter()
            for _ in range(repeat):
                await work()
            taken.append((perf_counter() - started) / repeat / units)
    return Comparison(name, against, median(times[0]), median(times[1]), at_most)
