"""Whatever is delivered, in whichever order, however often, and cut by crashes: each decision teaches once.

Two workers consume a generated history over one database. A delivery may be repeated, may die in the middle of its
transaction or after it, and may come before the sweep or after. A plain model of the rules says what must come of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app.stores.sqlite.learning as store
from app.bandit.decisions import Decision
from app.bandit.learning.attribution import GRACE_MS
from app.events.ports import LoggedEvent
from app.stores.sqlite.database import Database
from tests.support.clock import NOW_MS
from tests.support.database import wipe
from tests.support.events import feedback, served
from tests.support.learning import HOUR_MS, WINDOW_MS, School

USERS = ("ann", "bob")
TABLES = ("tip_scores", "decision_events", "bandit_states", "dead_letters")


class Crash(Exception):
    """The process dies here."""


class Told(NamedTuple):
    """An event about a decision of the history: `named` by its id, `action` None where the tip was served."""

    decision: int
    action: str | None
    after_h: int
    named: bool
    right_tip: bool


class Delivery(NamedTuple):
    """Events of the history by number, taken up by one of the workers, and how that ends."""

    events: tuple[int, ...]
    worker: int
    end: str  # "well"; "torn": within the transaction; "lost": after it, before they are marked; "sweep": settle first


told = st.builds(
    Told,
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
async def workers(database: Database) -> list[School]:
    """Two processes with one clock. One of them is without a challenger, as during a deploy."""
    first = School(database)
    return [first, School(database, shadow=False, clock=first.clock)]


async def begin(workers: Sequence[School], history: Sequence[Told]) -> tuple[list[Decision], list[LoggedEvent]]:
    """The decisions, all made at one moment, and the events about them, in the log."""
    school = workers[0]
    await wipe(school.database)
    await school.database.write(lambda connection: [connection.execute(f"DELETE FROM {table}") for table in TABLES])
    school.clock.step_to(NOW_MS)
    decisions = [await workers[number % 2].decide(USERS[number % 2]) for number in range(5)]
    school.clock.step_to(NOW_MS + 31 * HOUR_MS)
    seqs: list[int] = []
    for item in history:
        decision = decisions[item.decision]
        about: dict[str, Any] = {
            "tip_id": decision.chosen_id if item.right_tip else "another",
            "decision_id": decision.id if item.named else None,
        }
        at_ms = NOW_MS + item.after_h * HOUR_MS
        event = (
            served(decision.user_id, at_ms, **about)
            if item.action is None
            else feedback(decision.user_id, at_ms, item.action, **about)
        )
        seqs += await school.store(event)
    return decisions, await school.log.logged(seqs)


async def deliver(worker: School, events: Sequence[LoggedEvent], end: str, patch: pytest.MonkeyPatch) -> None:
    """As a worker takes events up, until it dies or has done with them."""
    if end == "sweep":
        await worker.bandit.learner.settle()
    if end == "torn":
        with patch.context() as torn:

            def die(*_: object) -> None:
                raise Crash

            torn.setattr(store, "write_evidence", die)
            try:
                await worker.bandit.learner.learn(events)
            except Crash:
                return
    else:
        await worker.bandit.learner.learn(events)
    if end != "lost":
        await worker.log.mark_consumed([event.seq for event in events], worker.clock.now_ms())


async def hold(
    workers: Sequence[School], history: Sequence[Told], made: Sequence[Delivery], patch: pytest.MonkeyPatch
) -> None:
    """Deliver, then everything once more, then sweep; and look."""
    school = workers[0]
    decisions, events = await begin(workers, history)
    for delivery in made:
        taken = [events[number] for number in delivery.events if number < len(events)]
        await deliver(workers[delivery.worker], taken, delivery.end, patch)
        await school.assert_learned_once()
    await asyncio.gather(*(deliver(worker, events, "well", patch) for worker in workers))
    school.clock.advance(2 * WINDOW_MS + GRACE_MS)
    await asyncio.gather(*(worker.bandit.learner.settle() for worker in workers))
    await school.assert_learned_once()

    states = dict(await school.rows("SELECT decision_id, state FROM tip_scores"))
    assert set(states.values()) <= {"learned", "expired"}, "one was never settled"
    counted = await school.rows(
        "SELECT decision_id, outcome, COUNT(*) FROM decision_events JOIN tip_scores USING (number)"
        " GROUP BY decision_id, outcome"
    )
    for decision in decisions:
        outcomes = {outcome: count for decision_id, outcome, count in counted if decision_id == decision.id}
        outcome = await school.outcome(decision)
        assert outcomes.get("learned", 0) == (outcome.source == "feedback")
        named = [item for item in history if item.named and decisions[item.decision] is decision]
        assert sum(outcomes.values()) >= len(named), "an event that names it was not counted"
        if outcome.state == "expired":
            assert not outcomes.keys() & {"served", "learned", "repeated"}
        else:
            assert outcome.served_at_ms is not None
    assert sum(count for _, _, count in counted) <= len(events), "an event counted twice"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(told, min_size=1, max_size=10), st.lists(deliveries, max_size=6))
async def test_each_decision_teaches_once_whatever_is_delivered(
    workers: list[School], monkeypatch: pytest.MonkeyPatch, history: list[Told], made: list[Delivery]
) -> None:
    await hold(workers, history, made, monkeypatch)


async def test_two_workers_learn_once_when_they_take_up_the_same_events_at_once(workers: list[School]) -> None:
    history = [Told(number % 5, ["completed", "snoozed", None][number % 3], 1, True, True) for number in range(10)]
    _, events = await begin(workers, history)
    await asyncio.gather(*(worker.bandit.learner.learn(events) for worker in workers for _ in range(5)))
    await workers[0].assert_learned_once()
    assert sum((await workers[0].counted()).values()) == len(events)
