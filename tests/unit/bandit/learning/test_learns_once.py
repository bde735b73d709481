"""Each decision is learned once, in whatever order and however often events are delivered, and wherever a worker dies.

Two workers consume a generated history over one database. A delivery may be repeated, may die within its transaction or
after it, and may come before or after settling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app.stores.sql.learning as store
from app.bandit.decisions import Decision
from app.bandit.learning.attribution import GRACE_MS
from app.features.events import LoggedEvent
from app.stores.sql.database import Database
from tests.support.bandit_process import HOUR_MS, WINDOW_MS, BanditProcess, feedback_for, served_for
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import open_again, wipe

pytestmark = pytest.mark.both_engines

USERS = ("ann", "bob")
TABLES = ("tip_scores", "decision_events", "bandit_states", "dead_letters")


class Crash(Exception):
    """Stands for the death of the process."""


class HistoryEvent(NamedTuple):
    """An event about the decision of that number. `action`: None for served. `named`: it has the decision's id."""

    decision: int
    action: str | None
    after_h: int
    named: bool
    right_tip: bool


class Delivery(NamedTuple):
    """Events of the history by number, the worker that consumes them, and how that ends."""

    events: tuple[int, ...]
    worker: int
    # "well"; "torn": dies in the transaction; "lost": dies before marking them consumed; "sweep": settles first
    end: str


history_events = st.builds(
    HistoryEvent,
    decision=st.integers(0, 4),
    action=st.sampled_from([None, None, "completed", "snoozed", "dismissed"]),
    after_h=st.integers(0, 30),
    named=st.booleans(),
    right_tip=st.integers(0, 5).map(bool),
)
deliveries = st.builds(
    Delivery,
    events=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
    worker=st.integers(0, 1),
    end=st.sampled_from(["well", "well", "torn", "lost", "sweep"]),
)


@pytest.fixture
async def workers(database: Database) -> list[BanditProcess]:
    """Two processes with one clock. One has no challenger, as during a rolling upgrade."""
    first = BanditProcess(database)
    return [first, BanditProcess(database, shadow=False, clock=first.clock)]


async def begin(
    workers: Sequence[BanditProcess], history: Sequence[HistoryEvent]
) -> tuple[list[Decision], list[LoggedEvent]]:
    """Five decisions made at the same time, and the logged events about them."""
    process = workers[0]
    await wipe(process.database)
    await process.database.write(
        lambda connection: [connection.execute(f"DELETE FROM {table}") for table in TABLES], of=()
    )
    process.clock.step_to(NOW_MS)
    decisions = [await workers[number % 2].decide(USERS[number % 2]) for number in range(5)]
    process.clock.step_to(NOW_MS + 31 * HOUR_MS)
    seqs: list[int] = []
    for item in history:
        decision, at_ms = decisions[item.decision], NOW_MS + item.after_h * HOUR_MS
        fields: dict[str, Any] = {} if item.named else {"decision_id": None}
        if not item.right_tip:
            fields["tip_id"] = "another"
        if item.action is None:
            seqs += await process.store(served_for(decision, at_ms, **fields))
        else:
            seqs += await process.store(feedback_for(decision, at_ms, item.action, **fields))
    return decisions, await process.log.logged(seqs)


async def deliver(worker: BanditProcess, events: Sequence[LoggedEvent], end: str, patch: pytest.MonkeyPatch) -> None:
    if end == "sweep":
        await worker.bandit.maintenance.settle()
    if end == "torn":
        with patch.context() as torn:

            def die(*_: object) -> None:
                raise Crash

            torn.setattr(store, "write_statistics", die)
            try:
                await worker.bandit.learner.learn(events)
            except Crash:
                return
    else:
        await worker.bandit.learner.learn(events)
    if end != "lost":
        await worker.log.mark_consumed([event.seq for event in events])


async def assert_learned_once(
    workers: Sequence[BanditProcess],
    history: Sequence[HistoryEvent],
    made: Sequence[Delivery],
    patch: pytest.MonkeyPatch,
) -> None:
    """Make the deliveries, deliver everything once more, settle, and check the invariants."""
    process = workers[0]
    decisions, events = await begin(workers, history)
    for delivery in made:
        taken = [events[number] for number in delivery.events if number < len(events)]
        await deliver(workers[delivery.worker], taken, delivery.end, patch)
        await process.assert_learned_once()
    await asyncio.gather(*(deliver(worker, events, "well", patch) for worker in workers))
    process.clock.advance(2 * WINDOW_MS + GRACE_MS)
    await asyncio.gather(*(worker.bandit.maintenance.settle() for worker in workers))
    await process.assert_learned_once()

    states = dict(await process.rows("SELECT decision_id, state FROM tip_scores"))
    assert set(states.values()) <= {"learned", "expired"}, "a decision was never settled"
    counted = await process.rows(
        "SELECT decision_id, outcome, COUNT(*) FROM decision_events JOIN tip_scores USING (number)"
        " GROUP BY decision_id, outcome"
    )
    for decision in decisions:
        outcomes = {outcome: count for decision_id, outcome, count in counted if decision_id == decision.id}
        outcome = await process.outcome(decision)
        assert outcomes.get("learned", 0) == (outcome.source == "feedback")
        named = [item for item in history if item.named and decisions[item.decision] is decision]
        assert sum(outcomes.values()) >= len(named), "an event that names the decision was not counted"
        if outcome.state == "expired":
            assert not outcomes.keys() & {"served", "learned", "repeated"}
        else:
            assert outcome.served_at_ms is not None
    assert sum(count for _, _, count in counted) <= len(events), "an event counted twice"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(history_events, min_size=1, max_size=10), st.lists(deliveries, max_size=6))
async def test_each_decision_is_learned_once_whatever_is_delivered(
    workers: list[BanditProcess], monkeypatch: pytest.MonkeyPatch, history: list[HistoryEvent], made: list[Delivery]
) -> None:
    await assert_learned_once(workers, history, made, monkeypatch)


async def test_two_workers_learn_once_when_they_consume_the_same_events(workers: list[BanditProcess]) -> None:
    actions = ["completed", "snoozed", None]
    history = [HistoryEvent(number % 5, actions[number % 3], 1, True, True) for number in range(10)]
    _, events = await begin(workers, history)
    await asyncio.gather(*(worker.bandit.learner.learn(events) for worker in workers for _ in range(5)))
    await workers[0].assert_learned_once()
    assert sum((await workers[0].counted()).values()) == len(events)


async def test_settling_times_rise_in_the_order_of_learning_when_clocks_differ(process: BanditProcess) -> None:
    behind = BanditProcess(process.database, clock=FakeClock(NOW_MS - HOUR_MS))
    decisions = [await process.decide() for _ in range(4)]
    await process.feed_back(decisions[3])
    await process.feed_back(decisions[2])  # in the same millisecond
    await behind.feed_back(decisions[1])
    process.clock.advance(1_000)
    await process.feed_back(decisions[0])
    assert await process.rows("SELECT number FROM tip_scores ORDER BY settled_at_ms, number") == (
        await process.rows("SELECT number FROM tip_scores ORDER BY number DESC")
    )
    assert (await process.outcome(decisions[0])).settled_at_ms == process.clock.now_ms()


@pytest.mark.slow
async def test_no_feedback_is_lost_when_processes_learn_from_one_user_at_once(database: Database) -> None:
    others = [await open_again(database) for _ in range(3)]
    try:
        processes = [BanditProcess(one) for one in (database, *others)]
        process = processes[0]
        made = await asyncio.gather(*(process.decide() for _ in range(200)))
        seqs = await process.store(*(feedback_for(decision, NOW_MS) for decision in made))
        events = await process.log.logged(seqs)
        await asyncio.gather(
            *(processes[place % 4].bandit.learner.learn([event]) for place, event in enumerate(events))
        )
        assert (await process.statistics()).decisions == 200
        await process.assert_learned_once()
    finally:
        for one in others:
            await one.close()
