"""Attribution: what an event means for a decision, and what is learned from it, on a real log and database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from app.bandit.decisions import DecisionState, EventOutcome
from app.bandit.learning.attribution import (
    GRACE_MS,
    SKEW_MS,
    JudgedDecision,
    Rules,
    judge,
    outcome_rewards,
)
from app.bandit.learning.maintenance import REST_S
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, SPECS, Input, Spec
from app.bandit.model.thompson_sampling import Policies
from app.errors import SettingsError, SpecMismatch, StoreUnavailable
from app.events.consume import ATTEMPTS
from app.features.clock import CLOCK_SKEW_MS, DAY_MS, HOUR_MS
from app.features.events import LoggedEvent, TipEvent
from app.stores.sql.database import Database
from app.stores.sql.learning import (
    SELECT_CLOSED,
    SELECT_STILL_CLOSED,
    SELECT_UNSERVED,
    UPDATE_EXPIRED,
    SqlLearning,
)
from app.stores.sql.samples import unknown_decisions
from app.stores.sqlite.backup import backup, restore
from app.stores.sqlite.database import SqliteDatabase
from tests.support.bandit_process import TIPS, WINDOW_MS, BanditProcess, feedback_for, served_for
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import InterruptedDatabase, nothing, steps
from tests.support.events import feedback, served
from tests.support.score_requests import s_of, y_of

pytestmark = pytest.mark.both_engines

POLICIES = Policies()
RULES = Rules(outcome_rewards(), WINDOW_MS)
ONE_DAY = NOW_MS + WINDOW_MS


def logged(event: TipEvent, received_at_ms: int = NOW_MS + 100 * WINDOW_MS) -> LoggedEvent:
    return LoggedEvent(1, event, received_at_ms, 0)


def unsettled(
    state: DecisionState, served_at_ms: int | None = None, source: str | None = None, *, told: bool = False
) -> JudgedDecision:
    """A decision made at `NOW_MS`; `told`: an event has said that it was served."""
    return JudgedDecision("tip", NOW_MS, state, served_at_ms, source, told)  # type: ignore[arg-type]  # of a table


JUDGED: list[tuple[JudgedDecision, TipEvent, EventOutcome, DecisionState, int | None]] = [
    (unsettled("open"), served(at_ms=NOW_MS + 5), "served", "served", NOW_MS + 5),
    (unsettled("open"), served(at_ms=NOW_MS - 5), "served", "served", NOW_MS),
    (unsettled("open"), served(at_ms=ONE_DAY), "served", "served", ONE_DAY),
    (unsettled("open"), served(at_ms=ONE_DAY + 1), "late", "open", None),
    (unsettled("open"), served(tip_id="other"), "other tip", "open", None),
    (unsettled("open"), feedback(at_ms=NOW_MS + 5), "learned", "learned", NOW_MS + 5),
    (unsettled("open"), feedback(at_ms=ONE_DAY + 1), "late", "open", None),
    (unsettled("open"), feedback(tip_id="other"), "other tip", "open", None),
    (unsettled("served", NOW_MS + 7), served(at_ms=NOW_MS + 9), "repeated", "served", NOW_MS + 7),
    (unsettled("served", NOW_MS + 7), feedback(at_ms=ONE_DAY + 7), "learned", "learned", NOW_MS + 7),
    (unsettled("served", NOW_MS + 7), feedback(at_ms=ONE_DAY + 8), "late", "served", NOW_MS + 7),
    (unsettled("served", NOW_MS + 7), feedback(at_ms=NOW_MS), "learned", "learned", NOW_MS + 7),
    (unsettled("served", NOW_MS + 7), feedback(tip_id="other"), "other tip", "served", NOW_MS + 7),
    (unsettled("learned", 7, "feedback"), feedback(), "repeated", "learned", 7),
    (unsettled("learned", 7, "feedback"), served(), "served", "learned", 7),
    (unsettled("learned", 7, "feedback", told=True), served(), "repeated", "learned", 7),
    (unsettled("learned", 7, "default"), feedback(), "late", "learned", 7),
    (unsettled("learned", 7, "default", told=True), served(), "repeated", "learned", 7),
    (unsettled("expired"), served(), "late", "expired", None),
    (unsettled("expired"), feedback(), "late", "expired", None),
]


def test_event_is_judged_by_the_rules() -> None:
    for decision, event, outcome, state, served_at in JUDGED:
        found = judge(decision, logged(event), RULES)
        assert (found.outcome, found.state, found.served_at_ms) == (outcome, state, served_at), (decision, event)
        assert (found.reward is None) == (outcome != "learned")


@pytest.mark.parametrize(("action", "reward"), [("completed", 1.0), ("snoozed", 0.3), ("dismissed", 0.0)])
def test_reward_is_that_of_the_action(action: str, reward: float) -> None:
    judged = judge(unsettled("open"), logged(feedback(action=action)), RULES)
    assert judged == ("learned", "learned", NOW_MS, reward, action)


def test_reward_is_the_override_when_there_is_one() -> None:
    rules = Rules(outcome_rewards([("snoozed", 0.25), ("none", 0.125)]), 24 * HOUR_MS)
    assert rules.rewards == {"completed": 1.0, "dismissed": 0.0, "snoozed": 0.25, "none": 0.125}
    assert judge(unsettled("open"), logged(feedback(action="snoozed")), rules).reward == 0.25


@pytest.mark.parametrize("name", ["ignored", "COMPLETED", "", "served"])
def test_override_is_rejected_when_its_outcome_is_unknown(name: str) -> None:
    allowed = "outcomes are completed, dismissed, snoozed, none"
    with pytest.raises(SettingsError, match=f"PROFILES_REWARDS: unknown outcome '{name}'; {allowed}"):
        outcome_rewards([(name, 1.0)])


async def test_action_of_a_later_release_becomes_a_dead_letter(
    process: BanditProcess,
) -> None:
    known, unknown = await process.decide("ann"), await process.decide("bob")
    seqs = await process.store(feedback_for(unknown, NOW_MS), feedback_for(known, NOW_MS))
    await process.execute("UPDATE tip_feedback SET action = 'shared' WHERE user_id = 'bob'")
    for _ in range(ATTEMPTS):
        await process.consumer.consume(seqs)
    assert await process.states(known, unknown) == ["learned", "open"]
    (letter,) = await process.dead_letters.list(0, 10)
    assert "unknown action 'shared'" in letter.error


def test_event_from_the_future_counts_from_its_arrival() -> None:
    event = feedback(at_ms=ONE_DAY + 10)
    assert judge(unsettled("open"), logged(event, ONE_DAY), RULES).outcome == "learned"
    assert judge(unsettled("open"), logged(event, ONE_DAY + 1), RULES).outcome == "late"


async def test_feedback_is_learned_from_the_logged_vector(process: BanditProcess) -> None:
    decision = await process.decide()
    assert (len(decision.phi), decision.spec_hash) == (SPEC_V2.size, SPEC_V2.hash)
    process.profiles["ann"] = {}  # the profile at the time of the feedback does not count
    at_ms = process.clock.now_ms()
    await process.serve(decision)
    assert await process.states(decision) == ["served"]
    assert not await process.has_learned()
    process.clock.advance(60_000)
    await process.feed_back(decision, "snoozed")
    events = {"served": 1, "learned": 1}
    learned = ("learned", at_ms, 0.3, "feedback", "snoozed", process.clock.now_ms(), events)
    assert await process.outcome(decision) == learned
    statistics = await process.statistics()
    np.testing.assert_array_equal(s_of(statistics), np.outer(decision.phi, decision.phi))
    np.testing.assert_array_equal(y_of(statistics), 0.3 * decision.phi)
    assert (await process.decide()).state_version == statistics.decisions == 1


async def test_served_event_after_the_feedback_counts_once_and_changes_nothing(process: BanditProcess) -> None:
    decision = await process.decide()
    at_ms = process.clock.now_ms()
    await process.consume(feedback_for(decision, at_ms + 7))
    learned = await process.outcome(decision)
    await process.serve(decision)
    assert await process.outcome(decision) == learned._replace(events={"learned": 1, "served": 1})
    await process.serve(decision)
    await process.consume(feedback_for(decision, at_ms + 9))
    assert await process.outcome(decision) == learned._replace(events={"learned": 1, "served": 1, "repeated": 2})
    assert process.metric("decision_events_total", outcome="served") == 1
    await process.assert_learned_once()


async def test_event_without_a_decision_id_belongs_to_the_newest_open_decision(
    process: BanditProcess,
) -> None:
    older, newer = [await process.decide(candidates=TIPS[:1]) for _ in range(2)]
    tip_id, now_ms = newer.chosen_id, process.clock.now_ms()
    await process.consume(feedback("ann", now_ms, tip_id=tip_id))
    assert await process.states(older, newer) == ["open", "learned"]
    await process.consume(served("ann", now_ms, tip_id=tip_id))
    assert await process.states(older, newer) == ["served", "learned"]
    await process.consume(feedback("bob", tip_id=tip_id), feedback("ann", tip_id="another"))
    assert await process.states(older) == ["served"]


@pytest.mark.parametrize("in_one_transaction", [True, False])
async def test_event_teaches_no_older_decision_when_it_is_delivered_again(
    process: BanditProcess, in_one_transaction: bool
) -> None:
    """1. It is learned for the newest decision; 2. it comes again, and an older decision of that tip is open."""
    older, newer = [await process.decide(candidates=TIPS[:1]) for _ in range(2)]
    events = await process.log.logged(await process.store(feedback("ann", NOW_MS, tip_id=newer.chosen_id)))
    for delivered in [events * 2] if in_one_transaction else [events] * 3:
        await process.bandit.learner.learn(delivered)
    assert await process.states(older, newer) == ["open", "learned"]
    await process.assert_learned_once()


async def test_event_belongs_to_no_later_decision_unless_it_names_it(process: BanditProcess) -> None:
    decision = await process.decide()
    long_ago = process.clock.now_ms() - SKEW_MS - 1
    await process.consume(feedback("ann", long_ago, tip_id=decision.chosen_id))
    assert await process.states(decision) == ["open"]
    await process.consume(feedback("ann", long_ago + 1, tip_id=decision.chosen_id))
    assert await process.states(decision) == ["learned"]


@pytest.mark.parametrize(("ahead_ms", "state"), [(CLOCK_SKEW_MS, "learned"), (CLOCK_SKEW_MS + 1, "open")])
async def test_event_belongs_to_a_decision_that_was_made_by_a_clock_ahead(
    process: BanditProcess, ahead_ms: int, state: str
) -> None:
    other = BanditProcess(process.database, clock=FakeClock(process.clock.now_ms() + ahead_ms))
    decision = await other.decide()
    await process.consume(feedback("ann", process.clock.now_ms(), tip_id=decision.chosen_id))
    assert await process.states(decision) == [state]


async def test_event_that_names_no_decision_of_its_user_is_counted_and_not_learned(process: BanditProcess) -> None:
    decision = await process.decide()
    for user_id, decision_id in (("bob", decision.id), ("ann", "unknown")):
        await process.consume(feedback(user_id, tip_id=decision.chosen_id, decision_id=decision_id))
    assert await process.states(decision) == ["open"]
    assert await process.counted() == {}
    assert await unknown_decisions(process.database, process.clock.now_ms()) == [("a producer", 2)]
    assert await unknown_decisions(process.database, process.clock.now_ms() + DAY_MS + 1) == []
    process.clock.advance(2 * DAY_MS)
    await process.consume(feedback("ann", decision_id="unknown"))
    assert await unknown_decisions(process.database, process.clock.now_ms()) == [("a producer", 1)]


async def test_unknown_decision_is_counted_once_when_learning_fails_first(process: BanditProcess) -> None:
    decision = await process.decide()
    await process.execute("INSERT INTO bandit_states VALUES ('ann', 'of another release', ?, 5, 1, NULL, NULL)", b"\0")
    seqs = await process.store(feedback_for(decision, NOW_MS), feedback("bob", NOW_MS, decision_id="unknown"))
    events = await process.log.logged(seqs)
    with pytest.raises(SpecMismatch):
        await process.bandit.learner.learn(events)
    await process.execute("DELETE FROM bandit_states")
    await process.bandit.learner.learn(events)
    assert await process.states(decision) == ["learned"]
    assert await unknown_decisions(process.database, process.clock.now_ms()) == [("a producer", 1)]


async def test_feedback_is_counted_and_not_learned_when_it_is_late_or_on_another_tip(process: BanditProcess) -> None:
    decision = await process.decide()
    await process.serve(decision)
    await process.consume(feedback_for(decision, process.clock.now_ms(), tip_id="another"))
    process.clock.advance(WINDOW_MS + 1)
    await process.feed_back(decision)
    assert not await process.has_learned()
    process.clock.advance(GRACE_MS)
    assert await process.bandit.maintenance.settle() == 1
    await process.consume(feedback_for(decision, process.clock.now_ms() - WINDOW_MS))
    outcome = await process.outcome(decision)
    assert (outcome.state, outcome.reward, outcome.source, outcome.action) == ("learned", 0.0, "default", None)
    assert outcome.events == {"served": 1, "other tip": 1, "late": 2}
    await process.assert_learned_once()


async def test_default_is_learned_when_the_window_has_closed_and_no_event_waits(
    process: BanditProcess,
) -> None:
    decision, bobs = await process.decide(), await process.decide("bob")
    await process.serve(decision)
    await process.serve(bobs)
    process.clock.advance(WINDOW_MS + GRACE_MS)
    assert await process.bandit.maintenance.settle() == 0
    process.clock.advance(1)
    await process.store(feedback_for(decision, NOW_MS + 5))
    assert await process.bandit.maintenance.settle() == 1
    assert await process.states(decision, bobs) == ["served", "learned"]
    await process.sweep()
    assert (await process.outcome(decision)).source == "feedback"
    assert await process.bandit.maintenance.settle() == 0
    await process.assert_learned_once()


async def test_decision_expires_unlearned_when_it_was_never_served(process: BanditProcess) -> None:
    decision = await process.decide()
    process.clock.advance(WINDOW_MS + GRACE_MS + 1)
    assert await process.bandit.maintenance.settle() == 1
    await process.consume(served_for(decision, NOW_MS))
    outcome = await process.outcome(decision)
    assert (outcome.state, outcome.reward, outcome.events) == ("expired", None, {"late": 1})
    assert not await process.has_learned()


async def test_more_decisions_are_settled_than_one_transaction_takes(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.learning.maintenance.SETTLED_AT_ONCE", 3)
    for number in range(8):
        decision = await process.decide(f"user-{number % 5}")
        if number % 4:
            await process.serve(decision)
    process.clock.advance(WINDOW_MS + GRACE_MS + 1)
    rests: list[float] = []

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    process.bandit.maintenance.pause = rest
    assert await process.bandit.maintenance.settle() == 8
    assert rests == [REST_S] * 2, "other processes can write between two transactions"
    states = await process.rows("SELECT state, COUNT(*) FROM tip_scores GROUP BY state ORDER BY state")
    assert states == [("expired", 2), ("learned", 6)]
    await process.assert_learned_once()


async def refuse() -> None:
    raise StoreUnavailable("read-only")


async def test_nothing_is_written_when_no_event_concerns_a_decision(process: BanditProcess) -> None:
    await process.decide()
    seqs = await process.store(served("bob"), feedback("ann", tip_id="none of them"))
    learning = SqlLearning(InterruptedDatabase(process.database, nothing, refuse), POLICIES, RULES)
    assert await learning.concerned(await process.log.logged(seqs)) == []


async def test_nothing_is_written_when_every_closed_decision_waits_for_an_event(process: BanditProcess) -> None:
    shown, aside, open_ = [await process.decide(user_id) for user_id in ("ann", "bob", "cleo")]
    await process.serve(shown)
    await process.serve(aside)
    await process.store(feedback_for(shown, NOW_MS), feedback_for(open_, NOW_MS))
    await process.execute("UPDATE tip_scores SET spec_hash = 'unreadable ' || spec_hash WHERE user_id = 'bob'")
    learning = SqlLearning(InterruptedDatabase(process.database, nothing, refuse), POLICIES, RULES)
    assert not any((await learning.settle(NOW_MS + 2 * WINDOW_MS, 9)).values())


async def test_decision_is_not_settled_when_its_event_comes_after_it_was_found(process: BanditProcess) -> None:
    shown, open_ = [await process.decide(user_id) for user_id in ("ann", "bob")]
    await process.serve(shown)

    async def store_events() -> None:
        await process.store(feedback_for(shown, NOW_MS), feedback_for(open_, NOW_MS))

    learning = SqlLearning(InterruptedDatabase(process.database, nothing, store_events), POLICIES, RULES)
    assert not any((await learning.settle(NOW_MS + 2 * WINDOW_MS, 9)).values())
    assert await process.states(shown, open_) == ["served", "open"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        (SELECT_CLOSED, {"closed": NOW_MS + 1, "known": f'["{SPEC_V2.hash}"]', "limit": 9}),
        (SELECT_UNSERVED, {"closed": NOW_MS + 1, "limit": 9}),
        (SELECT_STILL_CLOSED, {"closed": NOW_MS + 1, "known": f'["{SPEC_V2.hash}"]', "found": '[["ann", 1]]'}),
        (UPDATE_EXPIRED, {"now": 1, "found": '[["bob", 2]]'}),
    ],
    ids=["closed", "unserved", "still closed", "expired"],
)
async def test_settling_takes_as_long_when_many_events_wait(
    database_path: Path, process: BanditProcess, statement: str, parameters: dict[str, object]
) -> None:
    shown, _ = [await process.decide(user_id) for user_id in ("ann", "bob")]
    await process.serve(shown)
    taken = []
    for _ in range(2):
        for start in range(0, 2_000, 500):
            await process.store(*(feedback(f"user-{number}") for number in range(start, start + 500)))
        with closing(sqlite3.connect(database_path)) as connection:
            taken.append(steps(connection, statement, parameters))
    assert taken[1] <= taken[0] + 1


async def test_statistics_of_an_unknown_spec_are_never_added_to(process: BanditProcess) -> None:
    decision = await process.decide()
    await process.serve(decision)
    await process.execute("INSERT INTO bandit_states VALUES ('ann', 'of another release', ?, 5, 1, NULL, NULL)", b"\0")
    assert (await process.decide()).state_version == 0, "they were read"
    seqs = await process.store(feedback_for(decision, NOW_MS))
    with pytest.raises(SpecMismatch):
        await process.bandit.learner.learn(await process.log.logged(seqs))
    for _ in range(ATTEMPTS):
        await process.consumer.consume(seqs)
    (letter,) = await process.dead_letters.list(0, 10)
    assert "which this release does not know" in letter.error
    process.clock.advance(WINDOW_MS + GRACE_MS + 1)
    assert await process.bandit.maintenance.settle() == 1, "the decision that was never served"
    assert await process.states(decision) == ["served"]
    assert await process.rows("SELECT evidence, decisions FROM bandit_states") == [(b"\0", 5)]


async def test_learning_goes_on_after_a_backup_was_restored(
    database_path: Path, process: BanditProcess, tmp_path: Path
) -> None:
    for _ in range(3):
        await process.learn_one()
    waiting = await process.decide()
    backup(database_path, tmp_path / "copy.db")
    await process.feed_back(waiting, "dismissed")
    restore(tmp_path / "copy.db", tmp_path / "restored.db")

    database = await SqliteDatabase.open(tmp_path / "restored.db", readers=1)
    try:
        restored = BanditProcess(database, clock=process.clock)
        assert await restored.states(waiting) == ["open"]
        await restored.feed_back(waiting)
        assert (await restored.outcome(waiting)).action == "completed"
        assert (await restored.decide()).state_version == 4
        await restored.assert_learned_once()
    finally:
        await database.close()


async def test_decision_made_before_growth_is_learned_with_all_inputs(
    process: BanditProcess, database: Database
) -> None:
    plain = BanditProcess(database, shadow=False, clock=process.clock)
    first, second = await plain.decide(), await plain.decide()
    assert len(first.phi) == SPEC_V1.size
    await plain.feed_back(first)
    statistics = await plain.statistics()
    assert statistics.spec == SPEC_V1

    await process.feed_back(second)
    grown = await process.statistics()
    assert (grown.spec, grown.decisions) == (SPEC_V2, 2)
    known = [SPEC_V2.phi(made.candidates, made.context, made.profile)[made.chosen] for made in (first, second)]
    assert known[0][SPEC_V1.size :].any()
    np.testing.assert_array_equal(s_of(grown), np.outer(known[0], known[0]) + np.outer(known[1], known[1]))
    await process.assert_learned_once()

    third = await plain.decide()  # without a challenger again; grown statistics never shrink
    assert (third.spec_hash, third.policy_hash) == (SPEC_V2.hash, SPEC_V1.hash)
    assert third.phi[SPEC_V1.size :].any()
    await plain.feed_back(third)
    await process.assert_learned_once()


@pytest.mark.parametrize("other", [SPEC_V2.inputs[::-1], SPEC_V2.inputs[1:], SPEC_V1.inputs[::-1]])
@pytest.mark.parametrize("taught", [True, False], ids=["taught before", "taught nothing yet"])
async def test_vector_of_another_spec_is_refused_although_its_length_fits(
    process: BanditProcess, other: tuple[Input, ...], taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal length, or shorter: only the meaning of the numbers counts."""
    strange = Spec("strange", 2, other)
    monkeypatch.setitem(SPECS, strange.hash, strange)
    if taught:
        await process.learn_one()
    before = await process.rows("SELECT spec_hash, evidence, decisions FROM bandit_states")
    decision = await process.decide()
    values = (strange.hash, bytes(8 * strange.size), decision.id)
    await process.execute("UPDATE tip_scores SET spec_hash = ?, phi = ? WHERE decision_id = ?", *values)
    await process.store(feedback_for(decision, NOW_MS))
    for _ in range(ATTEMPTS):
        await process.sweep()
    assert await process.states(decision) == ["open"]
    ((error,),) = await process.rows("SELECT error FROM dead_letters")
    assert "SpecMismatch" in error
    assert await process.rows("SELECT spec_hash, evidence, decisions FROM bandit_states") == before
