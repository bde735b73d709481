"""A consumer of events over a real log, with a recording invalidator and learner."""

from collections.abc import Collection, Mapping, Sequence

from app.events.consume import Consumer
from app.features.events import LoggedEvent, TipEvent
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.database import column, log_of
from tests.support.events import admitted


class RecordingInvalidator:
    """Implements `Invalidates`: records its arguments, or raises `failure`."""

    def __init__(self) -> None:
        self.older: list[Mapping[str, Mapping[str, int]]] = []
        self.all: list[dict[str, set[str]]] = []
        self.failure: Exception | None = None

    async def invalidate(self, stale: Mapping[str, Collection[str]]) -> bool:
        if self.failure is not None:
            raise self.failure
        self.all.append({user: set(names) for user, names in stale.items()})
        return True

    async def drop_older(self, stale: Mapping[str, Mapping[str, int]]) -> None:
        if self.failure is not None:
            raise self.failure
        if stale:
            self.older.append(stale)


class RecordingLearner:
    """A learner that fails on events with the tip `poison` until it is cured. It raises `failure` if that is set."""

    def __init__(self) -> None:
        self.learned: list[str] = []
        self.lessons: list[int] = []
        self.cured = False
        self.failure: Exception | None = None

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        self.lessons.append(len(events))
        if self.failure is not None:
            raise self.failure
        if not self.cured and any(item.event.tip_id == "poison" for item in events):
            raise ValueError("cannot learn from this")
        self.learned += [item.event.event_id for item in events]


class ConsumerFixture:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = FakeClock()
        self.log = log_of(database)
        self.letters = SqlDeadLetters(database)
        self.invalidator = RecordingInvalidator()
        self.learner = RecordingLearner()
        self.metrics = Metrics()
        self.consumer = Consumer(
            log=self.log,
            letters=self.letters,
            invalidator=self.invalidator,
            learners=[self.learner.learn],
            clock=self.clock,
            metrics=self.metrics,
        )

    async def store(self, *events: TipEvent) -> list[int]:
        """Store events in the log; their sequence numbers."""
        (appended,) = await self.log.append([[admitted(event, self.clock.now_ms()) for event in events]])
        return list(appended.seqs)  # type: ignore[union-attr]  # nothing clashes here

    async def unconsumed(self) -> list[object]:
        """The ids of the events that are not consumed."""
        return await column(
            self.database, "SELECT event_id FROM outbox JOIN event_log USING (seq, user_id) ORDER BY seq"
        )
