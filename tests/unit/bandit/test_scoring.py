"""Scoring on a real database: one stored decision per request, from current data and never from erased data."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from app.bandit.decisions import Decision
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Spec
from app.bandit.model.thompson_sampling import CHAMPION, EPSILON, sample
from app.bandit.ports import ProposedDecision
from app.bandit.scoring import BOUNDS
from app.errors import NotFound, Overloaded, StoreUnavailable
from app.stores.sql.database import Database
from app.stores.sql.decisions import SqlDecisions
from tests.support.bandit_process import PROFILE, TIPS, BanditProcess, feedback_for, inject_failures
from tests.support.events import served
from tests.support.score_requests import tip

pytestmark = pytest.mark.both_engines


def same(left: Decision, right: Decision) -> bool:
    """Whether two decisions have the same bits, apart from shadow and duration."""
    for name in Decision.__struct_fields__:
        one, other = getattr(left, name), getattr(right, name)
        if name in ("ranking", "shadow", "elapsed_us"):
            continue
        if not (np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other):
            return False
    return all(map(np.array_equal, left.ranking, right.ranking))


async def test_decision_is_stored_with_everything_it_was_made_from(process: BanditProcess) -> None:
    await process.consume(served("ann"))
    decision = await process.decide(request_id="r")
    found, outcome = await process.bandit.scorer.explain(decision.id)
    assert same(found, decision)
    assert (outcome.state, outcome.events) == ("open", {})
    assert (decision.origin, decision.profile) == ("service", PROFILE)
    assert await process.stored("profile_present = 1") == 1
    assert (decision.role, decision.served_by, decision.policy_hash) == ("champion", "lints-v1", SPEC_V1.hash)
    assert (decision.state_version, decision.prior_version) == (0, 0)
    phi = SPEC_V2.phi(TIPS, decision.context, PROFILE)
    np.testing.assert_array_equal(decision.phi, phi[decision.chosen])
    assert decision.ranking.pi.sum() == pytest.approx(1)
    assert decision.ranking.pi.min() >= EPSILON / len(TIPS)
    assert decision.chosen == sample(decision.ranking.pi, decision.id)


async def test_next_decision_uses_what_was_learned(process: BanditProcess) -> None:
    for _ in range(5):
        decision = await process.decide()
        await process.feed_back(decision, "completed" if decision.chosen_id == "tip-2" else "dismissed")
    statistics = await process.statistics()
    decision = await process.decide()
    assert decision.state_version == 5
    phi = SPEC_V2.phi(TIPS, decision.context, PROFILE)
    expected, theta = CHAMPION.decide(decision.id, statistics, np.zeros(SPEC_V1.size), phi, explore=True)
    np.testing.assert_array_equal(decision.ranking.scores, expected.scores)
    np.testing.assert_array_equal(decision.ranking.pi, expected.pi)
    np.testing.assert_array_equal(decision.theta, theta)
    stranger = await process.decide("bob")
    assert not stranger.ranking.scores.any()


async def test_contributions_sum_to_the_score_under_both_policies(process: BanditProcess) -> None:
    for serving in (0.0, 1.0):
        await process.set_share(serving)
        for _ in range(3):
            await process.learn_one()
        decision = await process.decide()
        found = decision.contributions()
        assert found is not None
        spec: Spec = SPEC_V2 if serving else SPEC_V1
        assert [tuple(entry) for entry in found] == [spec.names] * len(TIPS)
        np.testing.assert_allclose([sum(entry.values()) for entry in found], decision.ranking.scores, atol=1e-12)
        assert any(found[0].values())


async def test_best_candidate_is_chosen_without_exploration(process: BanditProcess) -> None:
    twins = tuple(tip(name, True, 3.0, 2.0) for name in "abcdefgh")
    for _ in range(3):
        decision = await process.decide(candidates=twins, explore=False)
        assert (decision.chosen, decision.ranking.pi.tolist()) == (0, [1.0] + [0.0] * 7)
        await process.feed_back(decision)
        assert len(set(decision.ranking.scores.tolist())) == 1, "equal candidates differ by rounding"
    await process.assert_learned_once()


async def test_repeated_request_gets_the_stored_decision(process: BanditProcess) -> None:
    first = await process.decide(request_id="r")
    await process.feed_back(first)
    again = await process.decide(request_id="r", candidates=TIPS[:1], explore=False)
    assert same(again, first)
    assert await process.stored() == 1
    other = await process.decide("bob", request_id="r")
    assert (other.user_id, await process.stored()) == ("bob", 2)


async def test_one_decision_is_stored_when_a_request_is_sent_concurrently(database: Database) -> None:
    """1. Both read and find nothing; 2. both decide; 3. one decision is stored and answers both."""
    processes = [BanditProcess(database), BanditProcess(database)]
    found = await asyncio.gather(*(process.decide(request_id="r") for process in processes for _ in range(5)))
    assert {decision.id for decision in found} == {found[0].id}
    assert all(same(decision, found[0]) for decision in found)
    assert await processes[0].stored() == 1


@pytest.mark.parametrize("users", [1, 21])
async def test_each_concurrent_request_gets_its_own_stored_decision(process: BanditProcess, users: int) -> None:
    """Some requests of a group repeat others, some have no id, one user has statistics, and both policies serve."""
    await process.set_share(0.5)
    await process.feed_back(await process.decide("user-0"))
    asked = [(f"user-{number}", request_id) for number in range(users) for request_id in ("r", None, "s", "r", None)]
    made = await asyncio.gather(*(process.decide(user_id, request_id=request_id) for user_id, request_id in asked))
    assert [(decision.user_id, decision.request_id) for decision in made] == asked
    assert [decision.state_version for decision in made] == [1] * 5 + [0] * 5 * (users - 1)
    assert len({decision.role for decision in made}) == (2 if users > 1 else 1)
    for decision in made:
        assert same((await process.bandit.scorer.explain(decision.id))[0], decision)
    assert len({decision.id for decision in made}) == 4 * users == await process.stored() - 1


async def test_repeated_request_gets_the_stored_decision_though_its_own_is_outdated(process: BanditProcess) -> None:
    """1. A request is sent twice; 2. a worker learns between the reads; 3. both decisions are stored together."""
    made = await process.decide()
    first, second = (replace(made, id=name, request_id="r") for name in ("d-1", "d-2"))
    proposed = [ProposedDecision(first, 0, None), ProposedDecision(second, 0, (SPEC_V2.hash, 1))]
    found = await process.bandit.scorer.decisions.record(proposed)
    assert [decision and decision.id for decision in found] == ["d-1", "d-1"]
    assert await process.stored("request_id = 'r'") == 1


async def test_concurrent_decisions_share_reads_and_commits(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: dict[str, list[int]] = {"snapshots": [], "record": []}
    for name, noted in groups.items():
        real = getattr(SqlDecisions, name)

        async def noting(book: Any, items: Any, real: Any = real, noted: list[int] = noted) -> Any:
            noted.append(len(items))
            return await real(book, items)

        monkeypatch.setattr(SqlDecisions, name, noting)
    process = BanditProcess(process.database)
    await process.decide_at_once(50)
    assert await process.stored() == 50
    # The first snapshot of a process only asks which erasures there have been.
    assert groups == {"snapshots": [50, 50], "record": [50]}


@pytest.mark.parametrize("origin", ["request", "absent"])
async def test_profile_is_not_read_when_the_request_has_one(process: BanditProcess, origin: str) -> None:
    async def never() -> None:
        pytest.fail("a profile was read")

    process.while_reading_profile = never
    profile = {"completion_rate_30d": 0.5} if origin == "request" else None
    decision = await process.decide(origin=origin, profile=profile)
    assert (decision.origin, decision.profile) == (origin, profile)
    assert await process.stored("profile_present = 1") == (origin == "request")
    assert decision.phi[SPEC_V1.size :].any() == (origin == "request")


# --- Erasure


async def test_decision_is_made_anew_when_the_user_is_erased_meanwhile(process: BanditProcess) -> None:
    """1. A decision reads profile and statistics; 2. the user is erased; 3. the decision is refused and made anew."""
    for _ in range(2):
        await process.learn_one()
    (seq,) = await process.store(served("ann"))
    process.versions["ann"] = {"preferred_hour": seq}
    reads = 0

    async def erase_once() -> None:
        nonlocal reads
        reads += 1
        if reads == 1:
            await process.users.erase("ann", process.clock.now_ms())
        else:
            process.profiles["ann"] = {}
            process.versions.clear()

    process.while_reading_profile = erase_once
    decision = await process.decide()
    assert (reads, decision.state_version, decision.profile) == (2, 0, {})
    assert await process.stored() == 1
    assert not await process.has_learned()


async def test_request_fails_when_the_user_is_erased_during_every_attempt(process: BanditProcess) -> None:
    process.versions["ann"] = {"preferred_hour": 1}  # an event that does not exist

    async def erase() -> None:
        await process.users.erase("ann", process.clock.now_ms())

    process.while_reading_profile = erase
    with pytest.raises(StoreUnavailable, match="nothing was stored"):
        await process.decide()
    assert await process.stored() == 0


@pytest.mark.parametrize("learned", [0, 2])
async def test_decision_is_made_once_when_other_users_are_erased(process: BanditProcess, learned: int) -> None:
    for _ in range(learned):
        await process.learn_one()
    (seq,) = await process.store(served("ann"))
    process.versions["ann"] = {"preferred_hour": seq}
    erased = 0

    async def erase() -> None:
        nonlocal erased
        erased += 1
        await process.users.erase("bob", process.clock.now_ms())

    process.while_reading_profile = erase
    assert (await process.decide()).state_version == learned
    assert erased == 1


async def test_decision_is_made_anew_when_some_values_are_older_than_the_erasure(process: BanditProcess) -> None:
    """1. A value is read from the cache; 2. the user is erased, and sends events again; 3. another value is computed,
    from the new events; 4. the decision is refused because of the first value."""
    (old,) = await process.store(served("ann"))
    reads = 0

    async def erase_once() -> None:
        nonlocal reads
        reads += 1
        if reads == 1:
            await process.users.erase("ann", process.clock.now_ms())
            (new,) = await process.store(served("ann"))
            process.versions["ann"] = {"preferred_hour": old, "tip_volume_30d": new}
        else:
            process.versions.clear()

    process.while_reading_profile = erase_once
    await process.decide()
    assert reads == 2


async def test_feedback_consumed_after_the_erasure_restores_nothing(process: BanditProcess) -> None:
    decision = await process.decide()
    events = await process.log.logged(await process.store(feedback_for(decision, process.clock.now_ms())))
    erased = await process.users.erase("ann", process.clock.now_ms())
    assert (erased.decisions, erased.learned) == (1, 0)
    await process.bandit.learner.learn(events)
    assert await process.stored() == 0
    assert not await process.has_learned()
    with pytest.raises(NotFound):
        await process.bandit.scorer.explain(decision.id)


async def test_erasure_deletes_decisions_statistics_and_decision_events(process: BanditProcess) -> None:
    for user_id in ("ann", "bob"):
        for _ in range(3):
            await process.learn_one(user_id)
    before = await process.users.holdings("ann")
    assert (before.decisions, before.learned) == (3, 3)
    assert await process.users.erase("ann", process.clock.now_ms()) == before
    assert (await process.users.holdings("ann"))[-2:] == (0, 0)
    assert (await process.users.holdings("bob"))[-2:] == (3, 3)
    assert await process.rows("SELECT COUNT(*) FROM decision_events") == [(3,)]
    await process.assert_learned_once()


async def test_erasure_deletes_decisions_made_from_the_cached_profile(process: BanditProcess) -> None:
    """1. The erasure commits; 2. two decisions read the old profile from the cache; 3. the cached profile is deleted.

    One of them is stored before 3 and deleted. The other one is stored after 3, made anew.
    """
    reading, gone = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        reading.set()
        await gone.wait()

    (seq,) = await process.store(served("ann"))
    process.versions["ann"] = {"preferred_hour": seq}
    await process.users.erase("ann", process.clock.now_ms())
    early = await process.decide()
    process.while_reading_profile = hold
    deciding = asyncio.create_task(process.decide())
    await reading.wait()
    await process.users.erase_decisions("ann")
    process.while_reading_profile, process.profiles["ann"] = None, {}
    process.versions.clear()
    with pytest.raises(NotFound):
        await process.bandit.scorer.explain(early.id)
    gone.set()
    late = await deciding
    assert (await process.rows("SELECT decision_id FROM tip_scores")) == [(late.id,)]
    assert late.profile == {}


# --- Overload


async def test_request_is_shed_when_too_many_wait(process: BanditProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.bandit.scoring.BOUNDS", BOUNDS._replace(most=5))
    process = BanditProcess(process.database)
    outcomes = await process.decide_at_once(50)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    made = [outcome for outcome in outcomes if isinstance(outcome, Decision)]
    assert len(refused) + len(made) == 50
    assert refused[0].kind == "scores"
    assert len(made) == await process.stored() > 0
    assert (await process.decide()).id


async def test_no_decision_is_answered_that_was_not_stored(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_failures(monkeypatch, SqlDecisions, "record", [StoreUnavailable("locked")])
    process = BanditProcess(database)
    with pytest.raises(StoreUnavailable):
        await process.decide()
    await process.close()
    assert await process.stored() == 0


async def test_stage_of_another_challenger_lets_this_one_serve_nobody(process: BanditProcess) -> None:
    await process.execute("UPDATE rollout SET stage = 'ramp', share = 1, challenger = ?", SPEC_V2.hash)
    assert (await process.decide("ann")).role == "challenger"
    await process.execute("UPDATE rollout SET challenger = ?", SPEC_V1.hash)
    assert (await process.decide("ann")).role == "champion"
