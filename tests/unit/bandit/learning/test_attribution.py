"""Learning: what an event means for a decision, and what is learned from it, on a real log and database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.bandit.decisions import EventOutcome, State
from app.bandit.learning.attribution import GRACE_MS, HOUR_MS, SKEW_MS, Rules, Unsettled, judge
from app.bandit.model.specs import SPEC_V1, SPEC_V2, SPECS, Input, Spec
from app.errors import SettingsError, SpecMismatch, StoreUnavailable
from app.events.consume import ATTEMPTS
from app.events.ports import LoggedEvent
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.stores.sqlite.backup import backup, restore
from app.stores.sqlite.database import Database
from app.stores.sqlite.outbox import unknown_decisions
from tests.support.clock import NOW_MS
from tests.support.events import feedback, served
from tests.support.learning import TIPS, WINDOW_MS, School

RULES = Rules.of((), WINDOW_MS // HOUR_MS)


@pytest.fixture
async def school(database: Database) -> School:
    """A process with a challenger."""
    return School(database)


def logged(event: TipEvent, received_at_ms: int = NOW_MS + 100 * WINDOW_MS) -> LoggedEvent:
    """As a worker takes it up."""
    return LoggedEvent(1, event, received_at_ms, 0)


def unsettled(
    state: State, served_at_ms: int | None = None, source: str | None = None, *, told: bool = False
) -> Unsettled:
    """A decision made at `NOW_MS`; `told`: an event has said that it was served."""
    return Unsettled("tip", NOW_MS, state, served_at_ms, source, told)  # type: ignore[arg-type]  # of a table


ONE_DAY = NOW_MS + WINDOW_MS


@pytest.mark.parametrize(
    ("decision", "event", "outcome", "state", "served_at"),
    [
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
    ],
)
def test_an_event_means_what_the_rules_say(
    decision: Unsettled, event: TipEvent, outcome: EventOutcome, state: State, served_at: int | None
) -> None:
    found = judge(decision, logged(event), RULES)
    assert (found.outcome, found.state, found.served_at_ms) == (outcome, state, served_at)
    assert (found.reward is None) == (outcome != "learned")


@pytest.mark.parametrize(("action", "reward"), [("completed", 1.0), ("snoozed", 0.3), ("dismissed", 0.0)])
def test_reward_is_that_of_the_action(action: str, reward: float) -> None:
    judged = judge(unsettled("open"), logged(feedback(action=action)), RULES)
    assert judged == ("learned", "learned", NOW_MS, reward, action)


def test_reward_is_the_override_when_there_is_one() -> None:
    rules = Rules.of([("snoozed", 0.25), ("none", 0.125)], 24)
    assert rules.rewards == {"completed": 1.0, "dismissed": 0.0, "snoozed": 0.25, "none": 0.125}
    assert judge(unsettled("open"), logged(feedback(action="snoozed")), rules).reward == 0.25


@pytest.mark.parametrize("name", ["ignored", "COMPLETED", "", "served"])
def test_override_is_rejected_when_it_names_no_outcome(name: str) -> None:
    allowed = "outcomes are completed, dismissed, snoozed, none"
    with pytest.raises(SettingsError, match=f"PROFILES_REWARDS: unknown outcome '{name}'; {allowed}"):
        Rules.of([(name, 1.0)], 24)


async def test_action_of_a_later_release_becomes_a_dead_letter_and_holds_up_no_other_event(school: School) -> None:
    ours, theirs = await school.decide("ann"), await school.decide("bob")
    seqs = await school.store(
        feedback("bob", tip_id=theirs.chosen_id, decision_id=theirs.id),
        feedback("ann", tip_id=ours.chosen_id, decision_id=ours.id),
    )
    await school.database.write(lambda c: c.execute("UPDATE tip_feedback SET action = 'shared' WHERE user_id = 'bob'"))
    for _ in range(ATTEMPTS):
        await school.consumer.consume(seqs)
    assert [(await school.outcome(each)).state for each in (ours, theirs)] == ["learned", "open"]
    (letter,) = await school.letters.list(0, 10)
    assert "unknown action 'shared'" in letter.error


def test_an_event_from_the_future_counts_from_its_arrival() -> None:
    event = feedback(at_ms=ONE_DAY + 10)
    assert judge(unsettled("open"), logged(event, ONE_DAY), RULES).outcome == "learned"
    assert judge(unsettled("open"), logged(event, ONE_DAY + 1), RULES).outcome == "late"


async def test_feedback_is_learned_from_the_logged_vector(school: School) -> None:
    decision = await school.decide()
    assert (len(decision.phi), decision.spec_hash) == (SPEC_V2.size, SPEC_V2.hash)
    school.profiles["ann"] = {}  # what the profile is by then does not count
    at_ms = school.clock.now_ms()
    await school.tell(served("ann", at_ms, tip_id=decision.chosen_id, decision_id=decision.id))
    assert (await school.outcome(decision)).state == "served"
    assert await school.evidence() is None
    school.clock.advance(60_000)
    await school.tell(
        feedback("ann", school.clock.now_ms(), "snoozed", tip_id=decision.chosen_id, decision_id=decision.id)
    )
    assert await school.outcome(decision) == (
        "learned",
        at_ms,
        0.3,
        "feedback",
        "snoozed",
        school.clock.now_ms(),
        {"served": 1, "learned": 1},
    )
    evidence = await school.evidence()
    assert evidence is not None
    np.testing.assert_array_equal(evidence.s, np.outer(decision.phi, decision.phi))
    np.testing.assert_array_equal(evidence.y, 0.3 * decision.phi)
    again = await school.decide()
    assert again.state_version == evidence.decisions == 1


async def test_serving_that_is_told_after_its_feedback_counts_as_served_and_teaches_nothing_more(
    school: School,
) -> None:
    decision = await school.decide()
    at_ms = school.clock.now_ms()
    tip, named = decision.chosen_id, decision.id
    await school.tell(feedback("ann", at_ms + 7, tip_id=tip, decision_id=named))
    learned = await school.outcome(decision)
    await school.tell(served("ann", at_ms, tip_id=tip, decision_id=named))
    assert await school.outcome(decision) == learned._replace(events={"learned": 1, "served": 1})
    await school.tell(served("ann", at_ms, tip_id=tip, decision_id=named))
    await school.tell(feedback("ann", at_ms + 9, tip_id=tip, decision_id=named))
    assert await school.outcome(decision) == learned._replace(events={"learned": 1, "served": 1, "repeated": 2})
    counted = school.metrics.collectors.get_sample_value
    assert counted("profiles_decision_events_total", {"outcome": "served"}) == 1
    await school.assert_learned_once()


async def test_events_without_a_decisions_id_are_joined_to_the_newest_open_one_of_that_tip(school: School) -> None:
    older, newer = [await school.decide(candidates=TIPS[:1]) for _ in range(2)]
    tip_id = newer.chosen_id
    await school.tell(feedback("ann", school.clock.now_ms(), tip_id=tip_id))
    assert [(await school.outcome(item)).state for item in (older, newer)] == ["open", "learned"]
    await school.tell(served("ann", school.clock.now_ms(), tip_id=tip_id))
    assert [(await school.outcome(item)).state for item in (older, newer)] == ["served", "learned"]
    await school.tell(feedback("bob", tip_id=tip_id), feedback("ann", tip_id="another"))
    assert (await school.outcome(older)).state == "served"


async def test_an_event_teaches_no_older_decision_when_it_is_delivered_again(school: School) -> None:
    """1. It is learned for the newest decision; 2. the worker dies; 3. it comes again, and the next older is open."""
    older, newer = await school.decide(explore=False), await school.decide(explore=False)
    assert older.chosen_id == newer.chosen_id
    seqs = await school.store(feedback("ann", school.clock.now_ms(), tip_id=newer.chosen_id))
    events = await school.log.logged(seqs)
    for _ in range(3):
        await school.bandit.learner.learn(events)
    assert [(await school.outcome(item)).state for item in (older, newer)] == ["open", "learned"]
    await school.assert_learned_once()


async def test_an_event_teaches_once_when_it_comes_twice_in_one_transaction(school: School) -> None:
    older, newer = await school.decide(candidates=TIPS[:1]), await school.decide(candidates=TIPS[:1])
    seqs = await school.store(feedback("ann", school.clock.now_ms(), tip_id=newer.chosen_id))
    events = await school.log.logged(seqs)
    await school.bandit.learner.learn([*events, *events])
    assert [(await school.outcome(item)).state for item in (older, newer)] == ["open", "learned"]
    await school.assert_learned_once()


async def test_an_event_of_before_a_decision_is_not_joined_to_it_unless_it_names_it(school: School) -> None:
    decision = await school.decide()
    long_ago = school.clock.now_ms() - SKEW_MS - 1
    await school.tell(feedback("ann", long_ago, tip_id=decision.chosen_id))
    assert (await school.outcome(decision)).state == "open"
    await school.tell(feedback("ann", long_ago + 1, tip_id=decision.chosen_id))
    assert (await school.outcome(decision)).state == "learned"


async def test_an_event_that_names_no_decision_of_its_user_is_counted_and_not_learned(
    school: School,
) -> None:
    decision = await school.decide()
    for user_id, decision_id in (("bob", decision.id), ("ann", "unknown")):
        await school.tell(feedback(user_id, tip_id=decision.chosen_id, decision_id=decision_id))
    assert (await school.outcome(decision)).state == "open"
    assert await school.counted() == {}
    assert await unknown_decisions(school.database, school.clock.now_ms()) == [("a producer", 2)]
    assert await unknown_decisions(school.database, school.clock.now_ms() + DAY_MS + 1) == []
    school.clock.advance(2 * DAY_MS)
    await school.tell(feedback("ann", decision_id="unknown"))
    assert await unknown_decisions(school.database, school.clock.now_ms()) == [("a producer", 1)]


async def test_feedback_is_counted_and_not_learned_when_it_is_late_or_on_another_tip(school: School) -> None:
    decision = await school.decide()
    name: dict[str, Any] = {"tip_id": decision.chosen_id, "decision_id": decision.id}
    await school.tell(served("ann", school.clock.now_ms(), **name))
    await school.tell(feedback("ann", school.clock.now_ms(), tip_id="another", decision_id=decision.id))
    school.clock.advance(WINDOW_MS + 1)
    await school.tell(feedback("ann", school.clock.now_ms(), **name))
    assert await school.evidence() is None
    school.clock.advance(GRACE_MS)
    assert await school.bandit.learner.settle() == 1
    await school.tell(feedback("ann", school.clock.now_ms() - WINDOW_MS, **name))
    outcome = await school.outcome(decision)
    assert (outcome.state, outcome.reward, outcome.source, outcome.action) == ("learned", 0.0, "default", None)
    assert outcome.events == {"served": 1, "other tip": 1, "late": 2}
    await school.assert_learned_once()


async def test_the_default_is_learned_only_when_the_window_has_closed_and_no_event_of_the_user_waits(
    school: School,
) -> None:
    decision, bobs = await school.decide(), await school.decide("bob")
    for item in (decision, bobs):
        await school.tell(served(item.user_id, school.clock.now_ms(), tip_id=item.chosen_id, decision_id=item.id))
    school.clock.advance(WINDOW_MS + GRACE_MS)
    assert await school.bandit.learner.settle() == 0
    school.clock.advance(1)
    in_time = feedback("ann", NOW_MS + 5, tip_id=decision.chosen_id, decision_id=decision.id)
    await school.store(in_time)
    assert await school.bandit.learner.settle() == 1
    assert [(await school.outcome(item)).state for item in (decision, bobs)] == ["served", "learned"]
    await school.sweep()
    assert (await school.outcome(decision)).source == "feedback"
    assert await school.bandit.learner.settle() == 0
    await school.assert_learned_once()


async def test_a_decision_expires_unlearned_when_it_was_never_served(school: School) -> None:
    decision = await school.decide()
    school.clock.advance(WINDOW_MS + GRACE_MS + 1)
    assert await school.bandit.learner.settle() == 1
    await school.tell(served("ann", NOW_MS, tip_id=decision.chosen_id, decision_id=decision.id))
    outcome = await school.outcome(decision)
    assert (outcome.state, outcome.reward, outcome.events) == ("expired", None, {"late": 1})
    assert await school.evidence() is None


async def test_more_decisions_are_settled_than_one_transaction_takes(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.learning.attribution.SETTLED_AT_ONCE", 3)
    for number in range(8):
        decision = await school.decide(f"user-{number % 5}")
        if number % 4:
            await school.tell(served(decision.user_id, tip_id=decision.chosen_id, decision_id=decision.id))
    school.clock.advance(WINDOW_MS + GRACE_MS + 1)
    assert await school.bandit.learner.settle() == 8
    assert await school.rows("SELECT state, COUNT(*) FROM tip_scores GROUP BY state") == [
        ("expired", 2),
        ("learned", 6),
    ]
    await school.assert_learned_once()


async def test_nothing_is_written_when_no_event_concerns_a_decision(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    await school.decide()
    seqs = await school.store(served("bob"), feedback("ann", tip_id="none of them"))
    events = await school.log.logged(seqs)

    async def write(*_: object) -> None:
        raise StoreUnavailable("nobody may write")

    monkeypatch.setattr(Database, "write", write)
    await school.bandit.learner.learn(events)
    assert await school.bandit.learner.settle() == 0


async def test_evidence_of_an_unknown_spec_is_never_added_to(school: School) -> None:
    decision = await school.decide()
    await school.tell(served("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    await school.database.write(
        lambda c: c.execute("INSERT INTO bandit_states VALUES ('ann', 'of another release', x'00', 5, 1)")
    )
    cold = await school.decide()
    assert cold.state_version == 0, "it was read"
    seqs = await school.store(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    with pytest.raises(SpecMismatch):
        await school.bandit.learner.learn(await school.log.logged(seqs))
    for _ in range(ATTEMPTS):
        await school.consumer.consume(seqs)
    (letter,) = await school.letters.list(0, 10)
    assert "which this release does not know" in letter.error
    school.clock.advance(WINDOW_MS + GRACE_MS + 1)
    assert await school.bandit.learner.settle() == 1, "the one that was never served"
    assert (await school.outcome(decision)).state == "served"
    assert await school.rows("SELECT evidence, decisions FROM bandit_states") == [(b"\0", 5)]


async def test_learning_goes_on_after_a_backup_was_restored(school: School, tmp_path: Path) -> None:
    for _ in range(3):
        decision = await school.decide()
        await school.tell(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    waiting = await school.decide()
    backup(school.database.path, tmp_path / "copy.db")
    about: dict[str, Any] = {"tip_id": waiting.chosen_id, "decision_id": waiting.id}
    await school.tell(feedback("ann", **about, action="dismissed"))
    restore(tmp_path / "copy.db", tmp_path / "restored.db")

    database = await Database.open(tmp_path / "restored.db", readers=1)
    try:
        back = School(database, clock=school.clock)
        assert (await back.outcome(waiting)).state == "open"
        await back.tell(feedback("ann", **about))
        assert (await back.outcome(waiting)).action == "completed"
        assert (await back.decide()).state_version == 4
        await back.assert_learned_once()
    finally:
        await database.close()


async def test_a_decision_of_before_growth_is_learned_with_zeros_after_it(database: Database) -> None:
    plain = School(database, shadow=False)
    first, second = await plain.decide(), await plain.decide()
    assert len(first.phi) == SPEC_V1.size
    await plain.tell(feedback("ann", tip_id=first.chosen_id, decision_id=first.id))
    evidence = await plain.evidence()
    assert evidence is not None
    assert evidence.spec_hash == SPEC_V1.hash

    school = School(database, clock=plain.clock)
    await school.tell(feedback("ann", tip_id=second.chosen_id, decision_id=second.id))
    grown = await school.evidence()
    assert grown is not None
    assert (grown.spec_hash, grown.decisions) == (SPEC_V2.hash, 2)
    assert not grown.s[SPEC_V1.size :].any()
    await school.assert_learned_once()

    third = await plain.decide()  # the challenger is gone again; what has grown stays so
    assert (third.spec_hash, third.policy_hash) == (SPEC_V2.hash, SPEC_V1.hash)
    assert third.phi[SPEC_V1.size :].any()
    await plain.tell(feedback("ann", tip_id=third.chosen_id, decision_id=third.id))
    await school.assert_learned_once()


@pytest.mark.parametrize("other", [SPEC_V2.inputs[::-1], SPEC_V2.inputs[1:], SPEC_V1.inputs[::-1]])
@pytest.mark.parametrize("taught", [True, False], ids=["taught before", "taught nothing yet"])
async def test_vector_of_another_spec_is_refused_when_only_its_length_would_fit(
    school: School, other: tuple[Input, ...], taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal length, or shorter: what the numbers mean is what counts."""
    strange = Spec("strange", 2, other)
    monkeypatch.setitem(SPECS, strange.hash, strange)
    if taught:
        first = await school.decide()
        await school.tell(feedback("ann", tip_id=first.chosen_id, decision_id=first.id))
    before = await school.rows("SELECT spec_hash, evidence, decisions FROM bandit_states")
    decision = await school.decide()
    await school.database.write(
        lambda c: c.execute(
            "UPDATE tip_scores SET spec_hash = ?, phi = ? WHERE decision_id = ?",
            (strange.hash, bytes(8 * strange.size), decision.id),
        )
    )
    await school.store(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    for _ in range(ATTEMPTS):
        await school.sweep()
    assert (await school.outcome(decision)).state == "open"
    ((error,),) = await school.rows("SELECT error FROM dead_letters")
    assert "SpecMismatch" in error
    assert await school.rows("SELECT spec_hash, evidence, decisions FROM bandit_states") == before
