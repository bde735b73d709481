"""An ingestor among recorders: the real log, and what stands for invalidation and publishing."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from app.concurrency.batcher import Bounds
from app.events.ingest import Ingestor
from app.events.ports import Admitted, Appended, ClashingEvent, EventLog
from app.features.events import TipEvent
from app.stores.sql.database import Database
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.database import column, log_of


class Journal(list[str]):
    """What happened, in order."""


class RecordingLog:
    """The real log, which notes its commits; waits before one while `open` is not set; `failure` comes instead."""

    def __init__(self, database: Database, journal: Journal) -> None:
        self.log = log_of(database)
        self.journal = journal
        self.commits: list[list[int]] = []
        self.failure: Exception | None = None
        self.begun = False
        self.open = asyncio.Event()
        self.open.set()

    async def append(self, requests: Sequence[Sequence[Admitted]]) -> list[Appended | ClashingEvent]:
        self.begun = True
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        outcomes = await self.log.append(requests)
        self.commits.append([len(events) for events in requests])
        self.journal.append("commit")
        return outcomes


class RecordingInvalidator:
    """Implements `Invalidates`; waits while `open` is not set, raises what a test says."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.asked: list[Mapping[str, Collection[str]]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.result = True
        self.failure: Exception | None = None

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        self.asked.append(stale)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.journal.append("invalidate")
        return self.result

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        raise AssertionError("ingest deletes keys unconditionally")


class RecordingPublisher:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.published: list[list[int]] = []

    def publish(self, seqs: Sequence[int]) -> None:
        self.published.append(list(seqs))
        self.journal.append("publish")


class IngestFixture:
    def __init__(self, database: Database, bounds: Bounds | None = None) -> None:
        self.database = database
        self.clock = FakeClock()
        self.journal = Journal()
        self.log = RecordingLog(database, self.journal)
        self.invalidator = RecordingInvalidator(self.journal)
        self.publisher = RecordingPublisher(self.journal)
        self.metrics = Metrics()
        self.ingestor = Ingestor(
            log=cast(EventLog, self.log),  # nothing else of it is used
            invalidator=self.invalidator,
            publish=self.publisher.publish,
            retention_days=180,
            clock=self.clock,
            metrics=self.metrics,
            door="http",
            bounds=bounds,
        )

    async def ingest(self, *events: TipEvent) -> Appended:
        receipt = await self.ingestor.ingest(events)
        self.journal.append("answer")
        return receipt

    async def stored(self) -> list[object]:
        return await column(self.database, "SELECT event_id FROM event_log ORDER BY seq")

    def counted(self, outcome: str) -> float:
        labels = {"door": "http", "outcome": outcome}
        return self.metrics.collectors.get_sample_value("profiles_events_total", labels) or 0.0
