"""The same events, decisions and feedback into SQLite and PostgreSQL: every answer and every stored row is equal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from app.bandit.decisions import ScoringRequest
from app.bandit.model.inputs import Context
from app.bootstrap.bandit import bandit
from app.bootstrap.service import Edges, OpenService, open_service
from app.cli.demo_set import generate
from app.events.consume import Consumer
from app.features.clock import DAY_MS
from app.features.contract import Contract
from app.features.events import TipEvent
from app.features.schema import mirror_of
from app.profiles.ports import ComputeRow
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.bandit_process import feedback_for, served_for
from tests.support.clock import NOW_MS, FakeClock
from tests.support.registry import REGISTRY
from tests.support.score_requests import tip

DAYS = 90
TABLES = {
    "event_log": "user_id, seq",
    "tip_views": "user_id, seq",
    "tip_feedback": "user_id, seq",
    "outbox": "seq",
    "tip_scores": "number",
    "decision_events": "seq",
    "pool_shadows": "number",
    "bandit_states": "user_id",
    "bandit_priors": "version",
}
MEASURED = {"elapsed_us"}  # differs from run to run
TIPS = tuple(tip(f"tip-{n}", is_overdue=n % 2 == 0, task_age_days=1.5 * n, priority=float(n)) for n in range(5))


async def history(store: Path | PostgresUrl, valkey: EmbeddedServer, users: int) -> dict[str, Any]:
    """Let the service live through the demonstration set. Return its answers and its rows."""
    clock, random, found = FakeClock(), Random(1), dict[str, Any]()
    settings = Settings(database=store, cache_url=valkey.url, cache_timeout_ms=5_000, shadow=True)
    contract = Contract(registry=REGISTRY, mirror=mirror_of(REGISTRY))
    edges = Edges(clock=clock, random=Random(7), settles=False)
    async with open_service(settings, door="http", contract=contract, edges=edges) as service:
        sent = list(generate(users=users, days=DAYS, seed=1, now_ms=NOW_MS))
        sent.sort(key=lambda event: (event.occurred_at, event.event_id))
        while sent:
            size = random.choice((1, 7, 100, 500))
            await service.ingestor.ingest(sent[:size], historical=random.random() < 0.5)
            del sent[:size]
        names = [f"user-{number:04d}" for number in range(1, users + 1)]
        found["cold"] = [await service.reader.read({name: REGISTRY.full_mask}) for name in names[:20]]
        await service.reader.close()  # the fills are made
        found["batch"] = await service.reader.read(dict.fromkeys(names, REGISTRY.full_mask))
        await service.reader.close()
        found["cached"] = await service.reader.read(dict.fromkeys(names, REGISTRY.full_mask))
        found["decisions"] = await decided(service, clock, names)
        await service.erasure.erase(names[0])
        moments = [(None, None), (0, None), (DAY_MS // 3, None), (20 * DAY_MS, 20 * DAY_MS), (DAY_MS, 60_000)]
        asked = [
            ComputeRow(name, REGISTRY.full_mask, clock.now_ms() - (ago or 0), known and clock.now_ms() - known)
            for name in names
            for ago, known in moments
        ]
        found["history"] = await service.reader.read_as_of(asked)
        found["repeated"] = await service.reader.read_as_of([row._replace(version=5_000) for row in asked])
        for table, order in TABLES.items():
            found[table] = await rows(service, table, order)
    return found


async def rows(service: OpenService, table: str, order: str) -> list[dict[str, Any]]:
    def work(connection: Any) -> list[dict[str, Any]]:
        cursor = connection.execute(f"SELECT * FROM {table} ORDER BY {order}")
        names = [column[0] for column in cursor.description]
        return [
            {name: value for name, value in zip(names, row, strict=True) if name not in MEASURED}
            for row in cursor.fetchall()
        ]

    return await service.database.read(work)


async def decided(service: OpenService, clock: FakeClock, users: Sequence[str]) -> list[Any]:
    """Make decisions, and learn from feedback on them. Later rounds use a pooled prior. Return the outcomes."""
    numbers = count(1)
    own = bandit(
        service.settings,
        service.database,
        service.reader.read_recorded,
        clock,
        Metrics(),
        new_id=lambda: f"decision-{next(numbers)}",
    )
    consumer = Consumer(
        log=service.consumer.log,
        letters=service.dead_letters,
        invalidator=service.invalidator,
        learners=[own.learner.learn],
        clock=clock,
        metrics=Metrics(),
    )
    made: list[Any] = []
    for round_ in range(3):
        events: list[TipEvent] = []
        for place, user in enumerate(users):
            request = ScoringRequest(user_id=user, candidates=TIPS, context=Context(), request_id=f"r{round_}")
            decision = await own.scorer.score(request)
            made.append(decision.id)
            clock.advance(1_000)
            events.append(served_for(decision, clock.now_ms(), event_id=f"{decision.id}-served"))
            if place % 3:
                action = "completed" if (place + round_) % 2 else "dismissed"
                events.append(feedback_for(decision, clock.now_ms(), action, event_id=f"{decision.id}-feedback"))
        await service.ingestor.ingest(events)
        clock.advance(60_000)
        while await consumer.sweep():
            pass
        await own.maintenance.once()
        clock.advance(DAY_MS)
    await own.maintenance.once()
    await own.maintenance.shadow()
    return [(await own.scorer.explain(decision_id))[1] for decision_id in made]


@pytest.mark.slow
@pytest.mark.parametrize(
    "users",
    [
        pytest.param(15, id="1800"),
        pytest.param(110, id="13000", marks=pytest.mark.slow),
    ],
)
async def test_both_engines_give_equal_answers(
    users: int, database_path: Path, postgres_url: PostgresUrl, valkey: EmbeddedServer
) -> None:
    here, there = await history(database_path, valkey, users), await history(postgres_url, valkey, users)
    assert here.keys() == there.keys()
    assert len(here["event_log"]) > users * 100
    assert {row["reward_source"] for row in here["tip_scores"]} == {"feedback", "default"}
    assert any(row["prior_version"] for row in here["tip_scores"])
    for part, expected in here.items():
        same = there[part] == expected
        assert same, f"{part} differs"  # without a diff of megabytes
