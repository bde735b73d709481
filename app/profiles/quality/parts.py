"""The parts that data quality consists of, joined."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from app.features.clock import Clock
from app.features.registry import Registry
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.inspection import Inspector
from app.profiles.ports import NewestEvents, Population, Source
from app.profiles.quality.coalescing import SharedMeasurement
from app.profiles.quality.drilldown import Drilldown
from app.profiles.quality.runs import QualityRepository, QualityRunner
from app.profiles.quality.scan import REST, REST_WHEN_AWAITED, Scanner


class QualityServices(NamedTuple):
    """What measures, what keeps reports and carries out their runs, and what finds the users behind a number.

    `start` asks a worker to carry out a run; without an answer, the sweep does.
    """

    surveyor: Scanner
    measurement: SharedMeasurement
    book: QualityRepository
    runner: QualityRunner
    behind: Drilldown
    start: Callable[[int], Awaitable[None]]


class Starter(Protocol):
    """The queue, as far as it is needed here."""

    async def start_quality(self, run_id: int) -> None:
        """Ask a worker to carry out a run. What is not taken is lost; nothing is raised."""
        ...


class Facts(NamedTuple):
    """Where it comes from, and where reports are kept."""

    population: Population
    users: NewestEvents
    source: Source
    book: QualityRepository


def join(
    facts: Facts,
    inspector: Inspector,
    queue: Starter | None,
    availability: FeatureAvailability,
    registry: Registry,
    clock: Clock,
) -> QualityServices:
    """The parts over these."""
    population, users, source, book = facts

    def surveyor(rest: float) -> Scanner:
        return Scanner(
            inspector=inspector,
            population=population,
            source=source,
            registry=registry,
            clock=clock,
            availability=availability,
            rest=rest,
        )

    unhurried = surveyor(REST)
    return QualityServices(
        unhurried,
        SharedMeasurement(surveyor(REST_WHEN_AWAITED), registry, clock),
        book,
        QualityRunner(book=book, surveyor=unhurried, registry=registry, clock=clock),
        Drilldown(inspector=inspector, users=users, registry=registry, clock=clock),
        queue.start_quality if queue is not None else _nobody,
    )


async def _nobody(_: int) -> None:
    """There is nobody to ask."""
