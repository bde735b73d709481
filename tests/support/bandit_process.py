"""One process of the bandit over a real database, with a fake clock, given profiles and an event consumer."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from app.bandit.decisions import Decision, DecisionOutcome, ScoringRequest
from app.bandit.model.inputs import Context
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.rollout.controller import Rollout
from app.bootstrap.bandit import bandit
from app.events.consume import SWEEP_AGE_MS, Consumer
from app.features.clock import Clock
from app.features.events import TipEvent
from app.features.registry import ProfileRead, Scalar, ValueRead
from app.settings import Settings
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.retention import DecisionRetention
from app.stores.sql.sufficient_statistics import read_statistics
from app.stores.sql.users import SqlUsers
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.consumption import RecordingInvalidator
from tests.support.database import log_of
from tests.support.events import admitted, feedback, served
from tests.support.learning_check import SELECT_LEARNED, SELECT_STATES, learning_faults, shadow_faults
from tests.support.score_requests import tip
from tests.support.waiting import PATIENCE_S

HOUR_MS = 3_600_000
WINDOW_MS = Settings().reward_window_hours * HOUR_MS
PROFILE: Mapping[str, Scalar] = {"completion_rate_30d": 0.9, "tip_volume_30d": 40, "preferred_hour": 8}
TIPS = tuple(tip(f"tip-{number}", number % 2 == 0, 3.0 * number, float(number)) for number in range(4))
_numbers = itertools.count(1)


def inject_failures(patch: pytest.MonkeyPatch, owner: type, method: str, failures: Iterable[Exception | None]) -> None:
    """Let the next calls of an asynchronous method raise these errors. None: the call succeeds."""
    real, pending = getattr(owner, method), iter(failures)

    async def failing(self: object, *arguments: object) -> object:
        if (failure := next(pending, None)) is not None:
            raise failure
        return await real(self, *arguments)

    patch.setattr(owner, method, failing)


def rollout_of(settings: Settings, database: Database, clock: Clock) -> Rollout:
    async def read_profile(_: str) -> tuple[Mapping[str, Scalar], ProfileRead]:
        raise AssertionError("a roll-out reads no profile")

    return bandit(settings, database, read_profile, clock, Metrics()).rollout


class BanditProcess:
    """`while_reading_profile` is called whenever a profile is read. `profiles` are the profiles by user id, by default
    `PROFILE`. `versions` are the versions of their values by user id, by default those of a user without events."""

    def __init__(
        self,
        database: Database,
        *,
        shadow: bool = True,
        clock: FakeClock | None = None,
        ids: str = "decision",
        numbers: Iterator[int] = _numbers,
    ) -> None:
        """`ids` and `numbers` make the decisions' ids, from which the random numbers derive."""
        self.database = database
        self.clock = clock or FakeClock()
        self.metrics = Metrics()
        self.profiles: dict[str, Mapping[str, Scalar]] = {}
        self.versions: dict[str, Mapping[str, int]] = {}
        self.while_reading_profile: Callable[[], Any] | None = None
        self.bandit = bandit(
            Settings(shadow=shadow),
            database,
            self._profile,
            self.clock,
            self.metrics,
            new_id=lambda: f"{ids}-{next(numbers)}",
        )
        self.log = log_of(database)
        self.dead_letters = SqlDeadLetters(database)
        self.users = SqlUsers(database)
        self.retention = DecisionRetention(database)
        self.consumer = Consumer(
            log=self.log,
            letters=self.dead_letters,
            invalidator=RecordingInvalidator(),
            learners=[self.bandit.learner.learn],
            clock=self.clock,
            metrics=self.metrics,
        )

    async def _profile(self, user_id: str) -> tuple[Mapping[str, Scalar], ProfileRead]:
        if self.while_reading_profile is not None:
            await self.while_reading_profile()
        profile = self.profiles.get(user_id, PROFILE)
        versions = self.versions.get(user_id, dict.fromkeys(profile, -1))
        values = {name: ValueRead("fingerprint", version) for name, version in versions.items()}
        return profile, ProfileRead(self.clock.now_ms(), values)

    async def decide(self, user_id: str = "ann", **asked: Any) -> Decision:
        """A decision about `TIPS`; other fields of `ScoringRequest` by keyword."""
        fields: dict[str, Any] = {"candidates": TIPS, "context": Context(), **asked}
        return await self.bandit.scorer.score(ScoringRequest(user_id=user_id, **fields))

    async def decide_at_once(self, users: int) -> list[Decision | BaseException]:
        """Concurrent decisions about different users, or their errors."""
        decisions = (self.decide(f"user-{number}") for number in range(users))
        return await asyncio.gather(*decisions, return_exceptions=True)

    async def set_share(self, share: float) -> None:
        """Set the share of users that the challenger serves."""
        await self.execute("UPDATE rollout SET share = ?", share)

    async def stored(self, condition: str = "TRUE") -> int:
        """The number of stored decisions."""
        return int((await self.rows(f"SELECT COUNT(*) FROM tip_scores WHERE {condition}"))[0][0])

    async def shadowed(self) -> int:
        """The number of stored decisions that have a shadow."""
        return await self.stored("challenger_pi IS NOT NULL")

    async def close(self) -> None:
        await asyncio.wait_for(self.bandit.scorer.close(), PATIENCE_S)

    async def store(self, *events: TipEvent) -> list[int]:
        """Append events to the log without consuming them; returns their sequence numbers."""
        (appended,) = await self.log.append([[admitted(event, self.clock.now_ms()) for event in events]])
        return list(appended.seqs)  # type: ignore[union-attr]  # no event id is used twice

    async def consume(self, *events: TipEvent) -> None:
        seqs = await self.store(*events)
        assert await self.consumer.consume(seqs) == len(events)

    async def serve(self, decision: Decision) -> None:
        """Consume a served event of the decision's tip, at the current time."""
        await self.consume(served_for(decision, self.clock.now_ms()))

    async def feed_back(self, decision: Decision, action: str = "completed", **fields: Any) -> None:
        """Consume feedback on the decision's tip, at the current time."""
        await self.consume(feedback_for(decision, self.clock.now_ms(), action, **fields))

    async def learn_one(self, user_id: str = "ann") -> Decision:
        """A decision whose feedback has been learned."""
        decision = await self.decide(user_id)
        await self.feed_back(decision)
        return decision

    async def pool(self) -> bool:
        """Sum all ranges in a new round, and make a prior; return whether it was stored."""
        self.clock.advance(1)
        assert await self.bandit.maintenance.sum_ranges(self.clock.now_ms(), math.inf)
        return await self.bandit.maintenance.pool()

    async def sweep(self) -> None:
        """Consume the events that are still unconsumed, a little later."""
        self.clock.advance(SWEEP_AGE_MS + 1)
        await self.consumer.sweep()

    async def outcome(self, decision: Decision) -> DecisionOutcome:
        _, outcome = await self.bandit.scorer.explain(decision.id)
        return outcome

    async def states(self, *decisions: Decision) -> list[str]:
        return [(await self.outcome(decision)).state for decision in decisions]

    async def statistics(self, user_id: str = "ann") -> SufficientStatistics:
        statistics = await self.database.read(lambda connection: read_statistics(connection, user_id))
        assert statistics is not None
        return statistics

    async def has_learned(self, user_id: str = "ann") -> bool:
        """Whether the user has statistics."""
        return bool(await self.rows("SELECT 1 FROM bandit_states WHERE user_id = ?", user_id))

    async def counted(self) -> dict[str, int]:
        """The number of events about decisions, by their outcome."""
        return dict(await self.rows("SELECT outcome, COUNT(*) FROM decision_events GROUP BY outcome"))

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.collectors.get_sample_value(f"profiles_{name}", labels)

    async def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        return await self.database.read(lambda connection: connection.execute(sql, parameters).fetchall())

    async def execute(self, sql: str, *parameters: object) -> None:
        await self.database.write(lambda connection: connection.execute(sql, parameters), of=())

    async def assert_learned_once(self) -> None:
        """The statistics of every user are the sums over the learned decisions, each from its logged vector."""
        faults = learning_faults(await self.rows(SELECT_LEARNED), await self.rows(SELECT_STATES))
        assert not faults, faults

    async def assert_shadows(self) -> None:
        """Every learned decision has a shadow, and every shadow is the one that a replay of the log computes."""
        faults = await self.database.read(shadow_faults)
        assert not faults, faults


def served_for(decision: Decision, at_ms: int, **fields: Any) -> TipEvent:
    """A served event that names the decision; other fields by keyword."""
    return served(decision.user_id, at_ms, **{"tip_id": decision.chosen_id, "decision_id": decision.id, **fields})


def feedback_for(decision: Decision, at_ms: int, action: str = "completed", **fields: Any) -> TipEvent:
    """Feedback that names the decision; other fields by keyword."""
    named = {"tip_id": decision.chosen_id, "decision_id": decision.id, **fields}
    return feedback(decision.user_id, at_ms, action, **named)
