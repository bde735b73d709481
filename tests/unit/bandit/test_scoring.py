"""Scoring on a real database: one decision a request, durable, made of what is known; never of what was erased."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from app.bandit.decisions import Decision
from app.bandit.model.explanation import explained
from app.bandit.model.inputs import Candidate
from app.bandit.model.policy import CHALLENGER, CHAMPION, EPSILON, sample
from app.bandit.model.specs import SPEC_V1, SPEC_V2, Spec
from app.bandit.scoring import BOUNDS
from app.bandit.shadow.queue import BackgroundShadower
from app.bandit.shadow.scores import Unshadowed
from app.errors import Conflict, NotFound, Overloaded, StoreUnavailable, Unavailable
from app.stores.sqlite.database import Database
from app.stores.sqlite.decisions import SqliteDecisions
from tests.support.events import feedback, served
from tests.support.learning import KEEN, TIPS, Here, School
from tests.support.waiting import eventually_async


@pytest.fixture
async def school(database: Database) -> School:
    """A process with a challenger."""
    return School(database)


async def share(school: School, share: float) -> None:
    """So many are served by the challenger."""
    await school.database.write(lambda connection: connection.execute("UPDATE rollout SET share = ?", (share,)))


async def stored(school: School) -> int:
    """How many decisions there are."""
    return int((await school.rows("SELECT COUNT(*) FROM tip_scores"))[0][0])


async def shadowed(school: School, decision: Decision) -> Decision:
    """The decision, once its shadow is known."""
    await school.bandit.scorer.close()
    found, _ = await school.bandit.scorer.explain(decision.id)
    assert found.champion is not None
    assert found.challenger is not None
    return found


def same(left: Decision, right: Decision) -> bool:
    """To the last bit, the shadow apart."""
    for name in Decision.__dataclass_fields__:
        one, other = getattr(left, name), getattr(right, name)
        if name in ("champion", "challenger", "elapsed_us"):
            continue
        if not (np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other):
            return False
    return all(map(np.array_equal, left.ranking, right.ranking))


async def test_a_decision_is_stored_with_all_that_it_was_made_of(school: School) -> None:
    await school.tell(served("ann"))
    decision = await school.decide(request_id="r")
    found, outcome = await school.bandit.scorer.explain(decision.id)
    assert same(found, decision)
    assert (outcome.state, outcome.events) == ("open", {})
    assert (decision.origin, decision.profile, decision.profile_present) == ("service", KEEN, True)
    assert (decision.role, decision.served_by, decision.policy_hash) == ("champion", "lints-v1", SPEC_V1.hash)
    assert (decision.state_version, decision.prior_version) == (0, 0)
    phi = SPEC_V2.phi(TIPS, decision.context, KEEN)
    np.testing.assert_array_equal(decision.phi, phi[decision.chosen])
    assert decision.ranking.pi.sum() == pytest.approx(1)
    assert decision.ranking.pi.min() >= EPSILON / len(TIPS)
    assert decision.chosen == sample(decision.ranking.pi, decision.id)


async def test_what_was_learned_counts_in_the_next_decision(school: School) -> None:
    for _ in range(5):
        decision = await school.decide()
        action = "completed" if decision.chosen_id == "tip-2" else "dismissed"
        await school.tell(feedback("ann", action=action, tip_id=decision.chosen_id, decision_id=decision.id))
    evidence = await school.evidence()
    assert evidence is not None
    decision = await school.decide()
    assert decision.state_version == 5
    expected = CHAMPION.decide(decision.id, evidence, None, SPEC_V2.phi(TIPS, decision.context, KEEN))
    np.testing.assert_allclose(decision.ranking.scores, expected.means, atol=1e-12)
    np.testing.assert_array_equal(decision.ranking.pi, expected.pi)
    np.testing.assert_array_equal(decision.theta, expected.theta)
    stranger = await school.decide("bob")
    assert not stranger.ranking.scores.any()


async def test_contributions_sum_to_the_score_whoever_serves(school: School) -> None:
    for serving in (0.0, 1.0):
        await share(school, serving)
        for _ in range(3):
            taught = await school.decide()
            await school.tell(feedback("ann", tip_id=taught.chosen_id, decision_id=taught.id))
        decision = await school.decide()
        found = explained(decision)
        assert found is not None
        spec: Spec = SPEC_V2 if serving else SPEC_V1
        assert [tuple(entry) for entry in found] == [spec.names] * len(TIPS)
        np.testing.assert_allclose([sum(entry.values()) for entry in found], decision.ranking.scores, atol=1e-12)
        assert any(found[0].values())


async def test_the_best_is_taken_and_nothing_left_to_chance_when_it_must_not_explore(school: School) -> None:
    twins = tuple(Candidate(name, True, 3.0, 2.0) for name in "abcdefgh")
    for _ in range(3):
        decision = await school.decide(candidates=twins, explore=False)
        assert (decision.chosen, decision.ranking.pi.tolist()) == (0, [1.0] + [0.0] * 7)
        await school.tell(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
        assert len(set(decision.ranking.scores.tolist())) == 1, "equal candidates differ by rounding"
    await school.assert_learned_once()


async def test_a_repeated_request_gets_the_stored_decision_whatever_was_learned_since(school: School) -> None:
    first = await school.decide(request_id="r")
    await school.tell(feedback("ann", tip_id=first.chosen_id, decision_id=first.id))
    again = await school.decide(request_id="r", candidates=TIPS[:1], explore=False)
    assert same(again, first)
    assert await stored(school) == 1
    with pytest.raises(Conflict, match="'r' was used for another user") as caught:
        await school.decide("bob", request_id="r")
    assert [issue.path for issue in caught.value.issues] == ["request_id"]
    assert await stored(school) == 1


async def test_one_decision_is_made_when_the_same_request_comes_twice_at_once(database: Database) -> None:
    """1. Both look and find nothing; 2. both decide; 3. one is stored, and is the answer of both."""
    schools = [School(database), School(database)]
    found = await asyncio.gather(*(school.decide(request_id="r") for school in schools for _ in range(5)))
    assert {decision.id for decision in found} == {found[0].id}
    assert all(same(decision, found[0]) for decision in found)
    assert await stored(schools[0]) == 1


async def test_many_decisions_share_looks_and_commits(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[str, list[int]] = {"look": [], "record": []}
    for name, noted in groups.items():
        real = getattr(SqliteDecisions, name)

        async def noting(book: Any, items: Any, real: Any = real, noted: list[int] = noted) -> Any:
            noted.append(len(items))
            return await real(book, items)

        monkeypatch.setattr(SqliteDecisions, name, noting)
    school = School(school.database)
    decisions = await asyncio.gather(*(school.decide(f"user-{number}") for number in range(50)))
    assert len({decision.id for decision in decisions}) == await stored(school) == 50
    assert sum(groups["record"]) == 50
    assert max(groups["look"]) >= 40
    assert len(groups["record"]) <= 5


@pytest.mark.parametrize("origin", ["request", "absent"])
async def test_the_profile_sent_is_used_and_none_is_read(school: School, origin: str) -> None:
    async def never() -> None:
        pytest.fail("a profile was read")

    school.meanwhile = never
    profile = {"completion_rate_30d": 0.5} if origin == "request" else None
    decision = await school.decide(origin=origin, profile=profile)
    assert (decision.origin, decision.profile, decision.profile_present) == (origin, profile, origin == "request")
    assert decision.phi[SPEC_V1.size :].any() == (origin == "request")


# --- Erasing


async def test_nothing_read_of_a_user_is_stored_when_the_user_is_erased_meanwhile(school: School) -> None:
    """1. A decision reads profile and evidence; 2. the user is erased; 3. it would be stored."""
    for _ in range(2):
        decision = await school.decide()
        await school.tell(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    reads: list[str] = []

    async def erase_once() -> None:
        reads.append("profile")
        if len(reads) == 1:
            school.profiles["ann"] = {}
            school.meanwhile = erase_once
            await school.users.erase("ann", school.clock.now_ms())

    school.meanwhile = erase_once
    school.profiles["ann"] = {"completion_rate_30d": 0.99}
    decision = await school.decide()
    assert (len(reads), decision.state_version, decision.profile) == (2, 0, {})
    assert await stored(school) == 1
    assert await school.evidence() is None


async def test_it_is_told_so_when_users_are_erased_again_and_again(school: School) -> None:
    async def erase() -> None:
        await school.users.erase("somebody", school.clock.now_ms())

    school.meanwhile = erase
    with pytest.raises(StoreUnavailable, match="nothing was stored"):
        await school.decide()
    assert await stored(school) == 0


async def test_no_state_comes_back_when_what_a_user_was_told_of_is_consumed_after_the_erasure(school: School) -> None:
    decision = await school.decide()
    seqs = await school.store(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    events = await school.log.logged(seqs)
    erased = await school.users.erase("ann", school.clock.now_ms())
    assert (erased.decisions, erased.learned) == (1, 0)
    await school.bandit.learner.learn(events)
    await school.bandit.scorer.close()  # its shadow is written after the erasure
    assert await stored(school) == 0
    assert await school.evidence() is None
    with pytest.raises(NotFound):
        await school.bandit.scorer.explain(decision.id)


async def test_erasing_takes_decisions_states_and_what_is_known_of_events(school: School) -> None:
    for user_id in ("ann", "bob"):
        for _ in range(3):
            decision = await school.decide(user_id)
            await school.tell(feedback(user_id, tip_id=decision.chosen_id, decision_id=decision.id))
    before = await school.users.holdings("ann")
    assert (before.decisions, before.learned) == (3, 3)
    assert await school.users.erase("ann", school.clock.now_ms()) == before
    assert (await school.users.holdings("ann"))[-2:] == (0, 0)
    assert (await school.users.holdings("bob"))[-2:] == (3, 3)
    assert await school.rows("SELECT COUNT(*) FROM decision_events") == [(3,)]
    await school.assert_learned_once()


async def test_what_was_decided_by_the_old_profile_while_the_keys_were_still_there_goes_too(school: School) -> None:
    """1. The erasure commits; 2. two decisions read the old profile from the cache; 3. the keys are gone.

    One of the decisions is stored by then, and goes. The other one is stored later, made anew.
    """
    reading, gone = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        reading.set()
        await gone.wait()

    await school.users.erase("ann", school.clock.now_ms())
    early = await school.decide()
    school.meanwhile = hold
    deciding = asyncio.create_task(school.decide())
    await reading.wait()
    await school.users.erase_decisions("ann")
    school.meanwhile, school.profiles["ann"] = None, {}
    with pytest.raises(NotFound):
        await school.bandit.scorer.explain(early.id)
    gone.set()
    late = await deciding
    assert (await school.rows("SELECT decision_id FROM tip_scores")) == [(late.id,)]
    assert late.profile == {}


# --- The shadow


async def test_the_shadow_is_what_the_other_policy_makes_of_the_same_snapshot(school: School) -> None:
    for _ in range(4):
        decision = await school.decide()
        await school.tell(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
    assert await school.bandit.maintenance.pool()
    evidence = await school.evidence()
    assert evidence is not None
    for serving in (0.0, 1.0):
        await share(school, serving)
        decision = await school.decide()
        assert (decision.role, decision.prior_version) == ("challenger" if serving else "champion", 1)
        # What is learned before the shadow is worked out does not count.
        await school.tell(feedback("ann", tip_id=decision.chosen_id, decision_id=decision.id))
        found = await shadowed(school, decision)
        ((blob,),) = await school.rows("SELECT mu FROM bandit_priors")
        mu, phi = np.frombuffer(blob), SPEC_V2.phi(TIPS, decision.context, KEEN)
        for policy, ranking in ((CHAMPION, found.champion), (CHALLENGER, found.challenger)):
            scored = policy.decide(decision.id, evidence, mu, phi)
            assert ranking is not None
            np.testing.assert_allclose(ranking.scores, scored.means, atol=1e-11)
            np.testing.assert_allclose(ranking.pi, scored.pi, atol=1e-12)
        assert found.champion is not None
        assert found.challenger is not None
        q = np.clip(phi @ mu, 0, 1)
        ((p, other_p, agree, q_logged, v_champion, v_challenger),) = await school.rows(
            "SELECT champion_p, challenger_p, agree, q_logged, v_champion, v_challenger FROM tip_scores"
            " WHERE decision_id = ?",
            decision.id,
        )
        assert (p, other_p) == (found.champion.pi[decision.chosen], found.challenger.pi[decision.chosen])
        assert agree == (found.champion.scores.argmax() == found.challenger.scores.argmax())
        np.testing.assert_allclose(
            [q_logged, v_champion, v_challenger],
            [q[decision.chosen], found.champion.pi @ q, found.challenger.pi @ q],
        )
        evidence = await school.evidence()
        assert evidence is not None


async def test_there_is_no_shadow_without_a_challenger(database: Database) -> None:
    school = School(database, shadow=False)
    decision = await school.decide()
    await share(school, 1.0)
    assert (await school.decide()).role == "champion"
    await school.bandit.scorer.close()
    found, _ = await school.bandit.scorer.explain(decision.id)
    assert found.challenger is None
    assert len(found.phi) == SPEC_V1.size


async def test_a_shadow_is_dropped_and_counted_when_too_many_wait(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.shadow.queue.MOST_WAITING", 3)
    await asyncio.gather(*(school.decide(f"user-{number}") for number in range(10)))
    await school.bandit.scorer.close()
    counted = {
        outcome: school.metrics.collectors.get_sample_value("profiles_shadows_total", {"outcome": outcome})
        for outcome in ("stored", "dropped")
    }
    assert counted["stored"] is not None
    assert counted["dropped"] is not None
    assert counted["stored"] + counted["dropped"] == 10
    assert counted["dropped"] > 0
    with_shadow = await school.rows("SELECT COUNT(*) FROM tip_scores WHERE challenger_pi IS NOT NULL")
    assert with_shadow == [(int(counted["stored"]),)]


async def test_shadows_are_written_later_when_the_database_does_not_answer(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.shadow.queue.RETRY_S", 0.01)
    real, failures = SqliteDecisions.add_shadows, iter([StoreUnavailable("locked")] * 3)

    async def add(book: Any, shadows: Any) -> None:
        for failure in failures:
            raise failure
        await real(book, shadows)

    monkeypatch.setattr(SqliteDecisions, "add_shadows", add)
    await school.decide()

    async def there() -> bool:
        return await school.rows("SELECT COUNT(*) FROM tip_scores WHERE challenger_pi IS NOT NULL") == [(1,)]

    await eventually_async(there)


async def test_a_defect_costs_the_shadows_it_strikes_and_no_others(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = Here.shadows, iter([ValueError("a defect"), Unavailable("it died")])

    async def shadows(work: Here, group: Any) -> Any:
        for failure in failures:
            raise failure
        return await real(work, group)

    monkeypatch.setattr(Here, "shadows", shadows)
    monkeypatch.setattr("app.bandit.shadow.queue.AT_ONCE", 2)
    monkeypatch.setattr("app.bandit.shadow.queue.RETRY_S", 0.01)
    await asyncio.gather(*(school.decide(f"user-{number}") for number in range(6)))
    await school.bandit.scorer.close()
    assert await school.rows("SELECT COUNT(*) FROM tip_scores WHERE challenger_pi IS NOT NULL") == [(2,)]
    assert school.metrics.collectors.get_sample_value("profiles_shadows_total", {"outcome": "lost"}) == 4


async def test_closing_does_not_hang_when_shadows_are_not_worked_out_in_time(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = asyncio.Event()

    async def shadows(*_: object) -> Any:
        await closed.wait()
        raise Unavailable("about to stop")

    async def close(_: Here) -> None:
        closed.set()

    monkeypatch.setattr(Here, "shadows", shadows)
    monkeypatch.setattr(Here, "close", close)
    monkeypatch.setattr("app.bandit.shadow.queue.FINISH_S", 0.01)
    monkeypatch.setattr("app.bandit.shadow.queue.AT_ONCE", 1)
    await school.decide()
    await school.decide()
    await asyncio.wait_for(school.bandit.scorer.close(), 5)
    assert school.metrics.collectors.get_sample_value("profiles_shadows_total", {"outcome": "lost"}) == 2


async def test_closing_does_not_hang_when_the_database_does_not_answer(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def add(*_: object) -> None:
        raise StoreUnavailable("locked")

    monkeypatch.setattr(SqliteDecisions, "add_shadows", add)
    await school.decide()
    await asyncio.wait_for(school.bandit.scorer.close(), 5)
    assert school.metrics.collectors.get_sample_value("profiles_shadows_total", {"outcome": "lost"}) == 1


# --- Too much


async def test_who_comes_when_too_many_wait_is_sent_away(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bandit.scoring.BOUNDS", BOUNDS._replace(most=5))
    school = School(school.database)
    outcomes = await asyncio.gather(*(school.decide(f"user-{n}") for n in range(50)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    made = [outcome for outcome in outcomes if isinstance(outcome, Decision)]
    assert len(refused) + len(made) == 50
    assert refused[0].kind == "scores"
    assert len(made) == await stored(school) > 0
    assert (await school.decide()).id


async def test_nobody_is_answered_a_decision_that_is_not_stored(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def record(*_: object) -> None:
        raise StoreUnavailable("locked")

    added: list[Unshadowed] = []
    monkeypatch.setattr(SqliteDecisions, "record", record)
    monkeypatch.setattr(BackgroundShadower, "add", lambda _, item: added.append(item))
    troubled = School(school.database)
    with pytest.raises(StoreUnavailable):
        await troubled.decide()
    assert added == []
    assert await stored(school) == 0
