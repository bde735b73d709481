"""The bandit over a real database, with a clock that tests set, profiles they hand in, and a consumer of events."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.bandit.decisions import Decision, DecisionOutcome, ScoringRequest, Shadow
from app.bandit.learning.attribution import Rules
from app.bandit.model.inputs import Candidate, Context
from app.bandit.model.policies import Policies
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.rollout.assignment import serves_challenger
from app.bandit.shadow.scores import Unshadowed, shadows_of
from app.bootstrap import bandit as joins
from app.bootstrap.bandit_parts import Bandit, Outside, join
from app.events.consume import SWEEP_AGE_MS, Consumer
from app.features.events import TipEvent
from app.features.registry import Scalar
from app.settings import Settings
from app.stores.sqlite.database import Database
from app.stores.sqlite.dead_letters import SqliteDeadLetters
from app.stores.sqlite.decisions import SqliteDecisions
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.learning import SqliteLearning
from app.stores.sqlite.states import SqliteStates, read_statistics
from app.stores.sqlite.users import SqliteUsers
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.consumption import Drops
from tests.support.events import admitted
from tests.support.learned import SELECT_LEARNED, SELECT_STATES, learning_faults

WINDOW_H = 24
HOUR_MS = 3_600_000
WINDOW_MS = WINDOW_H * HOUR_MS
KEEN: Mapping[str, Scalar] = {"completion_rate_30d": 0.9, "tip_volume_30d": 40, "preferred_hour": 8}
TIPS = tuple(Candidate(f"tip-{number}", number % 2 == 0, 3.0 * number, float(number)) for number in range(4))
_numbers = itertools.count(1)


class Here:
    """Computes shadows in this process. The tests of the shadow subprocess hold it to the same results."""

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """Those of `shadows_of`."""
        return shadows_of(group, Policies.of(shadow=True))

    async def close(self) -> None:
        """Nothing runs."""


class School:
    """One process. `meanwhile` runs whenever a profile is read."""

    def __init__(self, database: Database, *, shadow: bool = True, clock: FakeClock | None = None) -> None:
        self.database = database
        self.clock = clock or FakeClock()
        self.metrics = Metrics()
        self.profiles: dict[str, Mapping[str, Scalar]] = {}
        self.meanwhile: Callable[[], Any] | None = None
        self.rules = Rules.of((), WINDOW_H)
        self.lineup = Policies.of(shadow=shadow)
        self.outside = Outside(
            SqliteDecisions(database, self.lineup.longest),
            SqliteLearning(database, self.lineup, self.rules),
            SqliteStates(database, self.lineup.longest),
            self._profile,
            Here(),
        )
        self.bandit: Bandit = join(
            self.outside,
            self.lineup,
            serves_challenger=serves_challenger,
            rollout=joins.rollout(Settings(), database, self.clock, self.lineup, self.rules),
            new_id=lambda: f"decision-{next(_numbers)}",
            clock=self.clock,
            metrics=self.metrics,
        )
        self.log = SqliteEventLog(database)
        self.letters = SqliteDeadLetters(database)
        self.users = SqliteUsers(database)
        self.consumer = Consumer(
            log=self.log,
            letters=self.letters,
            invalidator=Drops(),
            learners=[self.bandit.learner],
            clock=self.clock,
            metrics=self.metrics,
        )

    async def _profile(self, user_id: str) -> Mapping[str, Scalar]:
        if self.meanwhile is not None:
            await self.meanwhile()
        return self.profiles.get(user_id, KEEN)

    async def decide(self, user_id: str = "ann", **asked: Any) -> Decision:
        """A decision about `TIPS`; the fields of `ScoringRequest` by keyword."""
        fields: dict[str, Any] = {"candidates": TIPS, "context": Context(), **asked}
        return await self.bandit.scorer.score(ScoringRequest(user_id=user_id, **fields))

    async def store(self, *events: TipEvent) -> list[int]:
        """Sequence numbers of the events, now in the log and not consumed."""
        (appended,) = await self.log.append([[admitted(event, self.clock.now_ms()) for event in events]])
        return list(appended.seqs)  # type: ignore[union-attr]  # nothing clashes here

    async def tell(self, *events: TipEvent) -> None:
        """Store and consume."""
        seqs = await self.store(*events)
        assert await self.consumer.consume(seqs) == len(events)

    async def sweep(self) -> None:
        """A little later, whatever stayed unconsumed is taken up."""
        self.clock.advance(SWEEP_AGE_MS + 1)
        await self.consumer.sweep()

    async def outcome(self, decision: Decision) -> DecisionOutcome:
        """What came of it."""
        _, outcome = await self.bandit.scorer.explain(decision.id)
        return outcome

    async def evidence(self, user_id: str = "ann") -> SufficientStatistics | None:
        """As stored."""
        return await self.database.read(lambda connection: read_statistics(connection, user_id))

    async def counted(self) -> dict[str, int]:
        """Events that concerned a decision, by what came of them."""
        return dict(await self.rows("SELECT outcome, COUNT(*) FROM decision_events GROUP BY outcome"))

    async def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What the database says."""
        return await self.database.read(lambda connection: connection.execute(sql, parameters).fetchall())

    async def assert_learned_once(self) -> None:
        """Every user's evidence is the sum over the decisions that were learned, each from its logged vector."""
        faults = learning_faults(await self.rows(SELECT_LEARNED), await self.rows(SELECT_STATES))
        assert not faults, faults
