"""Whoever measures quality in the tests: the parts over one process of a world, with a pause that takes no time."""

from __future__ import annotations

from app.profiles.consistency.inspection import Inspector
from app.profiles.quality.coalescing import SharedMeasurement
from app.profiles.quality.drilldown import Drilldown
from app.profiles.quality.runs import QualityRunner
from app.profiles.quality.scan import Scanner
from app.stores.sqlite.population import SqlitePopulation
from app.stores.sqlite.quality_runs import SqliteQualityRepository
from app.stores.sqlite.users import SqliteUsers
from tests.support.service import Service


class Office:
    """The parts, and how long they rested."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.rests: list[float] = []
        users = SqliteUsers(service.database)
        registry, clock = service.registry, service.clock
        self.meter = Inspector(
            cache=service.cache,
            trusted=service.gate.holds,
            users=users,
            computation=service.computation,
            registry=registry,
            pause=self._at_once,
        )
        self.surveyor = Scanner(
            inspector=self.meter,
            population=SqlitePopulation(service.database),
            source=service.source,
            registry=registry,
            clock=clock,
            pause=self._rest,
        )
        self.measurement = SharedMeasurement(self.surveyor, registry, clock)
        self.book = SqliteQualityRepository(service.database)
        self.runner = QualityRunner(book=self.book, surveyor=self.surveyor, registry=registry, clock=clock)
        self.behind = Drilldown(inspector=self.meter, users=users, registry=registry, clock=clock)

    async def _at_once(self, _: float) -> None:
        """No pause before a second look."""

    async def _rest(self, seconds: float) -> None:
        self.rests.append(seconds)
