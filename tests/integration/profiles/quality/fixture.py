"""Data quality over one process of a group, with a seed for the draw and pauses that take no time."""

from random import Random

from app.profiles.consistency.inspection import Inspector
from app.profiles.online.cache_protocol import Filler
from app.profiles.quality.measurement import DataQuality
from app.stores.sql.quality_runs import SqlQualityRepository
from app.telemetry import Metrics
from tests.support.service import PausableService


class QualityFixture:
    """The parts, and the pauses that they asked for."""

    def __init__(self, service: PausableService, seed: int = 1) -> None:
        self.service = service
        self.pauses: list[float] = []
        self.users = service.inner.users
        self.inspector = Inspector(
            filler=Filler(service.cache, service.registry, Metrics()),
            distrusted=service.inner.reader.gate.distrusted,
            users=self.users,
            computation=service.computation,
            pause=self._at_once,
        )
        self.runs = SqlQualityRepository(service.database)
        self.quality = DataQuality(inspector=self.inspector, random=Random(seed), runs=self.runs, pause=self._pause)

    async def _at_once(self, _: float) -> None:
        """No pause before a second look."""

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
