"""Shadows: stored for every decision that is learned, and computed from what the decision was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest

from app.bandit.decisions import Decision
from app.bandit.learning import maintenance
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Array, Context
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, OTHER, POOLED_CHAMPION
from app.bandit.ports import ProposedDecision
from app.errors import NotFound, StoreUnavailable
from app.stores.sql import shadows
from app.stores.sql.database import Database
from app.stores.sql.decisions import SqlDecisions
from app.stores.sql.sufficient_statistics import prior_of, read_statistics
from tests.support.bandit_process import HOUR_MS, WINDOW_MS, BanditProcess
from tests.support.logs import Recorder
from tests.support.score_requests import same_bits, tip, y_of

pytestmark = pytest.mark.both_engines
USERS = ("ann", "bob")
SELECT_POOL = "SELECT pool_p, v_pool FROM pool_shadows JOIN tip_scores USING (number) WHERE decision_id = ?"


async def known_to(process: BanditProcess, decision: Decision) -> tuple[SufficientStatistics, Array]:
    """What a decision that was just made was made from: the user's statistics, and the mean of the prior."""
    statistics = await process.database.read(lambda connection: read_statistics(connection, decision.user_id))
    mu = await process.database.read(lambda connection: prior_of(connection, SPEC_V2, decision.prior_version).mu)
    return statistics or SufficientStatistics.none(SPEC_V2), mu


async def assert_shadow(process: BanditProcess, decision_id: str, statistics: SufficientStatistics, mu: Array) -> None:
    """Both rankings have the bits that each policy computes from these statistics."""
    found, _ = await process.bandit.scorer.explain(decision_id)
    assert found.state_version == statistics.decisions
    phi = SPEC_V2.phi(found.candidates, found.context, found.profile)
    rankings = {found.role: found.ranking, OTHER[found.role]: found.shadow}
    for policy, ranking in ((CHAMPION, rankings["champion"]), (CHALLENGER, rankings["challenger"])):
        expected, _ = policy.decide(decision_id, statistics, mu, phi, found.explore)
        assert ranking is not None
        assert all(map(same_bits, ranking, expected))
    (_, pi), _ = POOLED_CHAMPION.decide(decision_id, statistics, mu[: SPEC_V1.size], phi, found.explore)
    pool = await process.database.row(SELECT_POOL, (decision_id,))
    assert pool == (pi[found.chosen], pi @ np.clip(phi @ mu, 0, 1))


def acting_before_record(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]
) -> BanditProcess:
    """Another process, which calls `act` whenever it has made a decision and is about to store it."""
    real = SqlDecisions.record

    async def record(self: SqlDecisions, proposed: Sequence[ProposedDecision]) -> Any:
        await act()
        return await real(self, proposed)

    monkeypatch.setattr(SqlDecisions, "record", record)
    return BanditProcess(process.database, clock=process.clock)


@pytest.mark.parametrize("seed", range(4))
async def test_shadows_are_those_of_the_statistics_that_decisions_were_made_from(
    process: BanditProcess, seed: int
) -> None:
    """Requests, feedback, defaults, growth, pooling, and the pass of a worker, in any order, in two processes."""
    random, api = Random(seed), BanditProcess(process.database, clock=process.clock)
    made: list[tuple[Decision, SufficientStatistics, Array]] = []
    unsettled: list[Decision] = []
    for _ in range(60):
        process.clock.advance(random.randrange(1, HOUR_MS))
        step = random.choices(
            ["decide", "feedback", "serve", "settle", "shadow", "pool", "share"], [8, 6, 3, 2, 2, 1, 1]
        )[0]
        if step == "decide":
            user = random.choice(USERS)
            api.profiles[user] = {"completion_rate_30d": random.random(), "tip_volume_30d": random.randrange(99)}
            tips = tuple(
                tip(str(n), random.random() < 0.5, random.expovariate(0.1), random.gauss(0, 2))
                for n in range(random.randrange(1, 6))
            )
            at = datetime(2026, 3, 2, tzinfo=UTC) + timedelta(seconds=random.randrange(86_400))
            decision = await api.decide(user, candidates=tips, context=Context(at), explore=random.random() < 0.8)
            made.append((decision, *(await known_to(api, decision))))
            unsettled.append(decision)
        elif step in ("feedback", "serve") and unsettled:
            decision = unsettled.pop(random.randrange(len(unsettled)))
            await (process.serve(decision) if step == "serve" else process.feed_back(decision, "dismissed"))
        elif step == "settle":
            process.clock.advance(random.choice([0, WINDOW_MS]))
            await process.bandit.maintenance.settle()
        elif step == "shadow":
            await process.bandit.maintenance.shadow()
        elif step == "pool":
            await process.pool()
        elif step == "share":
            await process.set_share(random.choice([0.0, 0.5, 1.0]))
    await process.bandit.maintenance.shadow()
    assert await process.stored("champion_p IS NULL AND state <> 'expired'") == 0
    for decision, statistics, mu in made:
        if await process.stored(f"decision_id = '{decision.id}' AND champion_p IS NOT NULL"):
            await assert_shadow(process, decision.id, statistics, mu)
    await process.assert_shadows()
    await process.assert_learned_once()


async def test_reward_does_not_reach_the_shadow_of_its_decision(process: BanditProcess) -> None:
    """Nor the shadows of decisions made from the same statistics, although no worker has computed them before."""
    await process.learn_one()
    decisions = [await process.decide() for _ in range(3)]
    statistics, mu = await known_to(process, decisions[0])
    await process.feed_back(decisions[1])
    assert await process.stored("champion_p IS NULL") == 0
    for decision in decisions:
        await assert_shadow(process, decision.id, statistics, mu)


async def test_decision_is_made_anew_when_its_statistics_change_meanwhile(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A request reads statistics; 2. a worker learns a reward; 3. the decision is refused and made anew."""
    earlier = [await process.decide(), await process.decide("bob")]

    async def learn() -> None:
        while earlier:
            await process.feed_back(earlier.pop())

    decision = await acting_before_record(process, monkeypatch, learn).decide()
    assert (decision.state_version, await process.stored()) == (1, 3)
    statistics, mu = await known_to(process, decision)
    await process.bandit.maintenance.shadow()
    await assert_shadow(process, decision.id, statistics, mu)


@pytest.mark.parametrize("how", ["by a worker", "with a reward"])
async def test_shadow_is_that_of_the_statistics_before_growth(database: Database, how: str) -> None:
    plain = BanditProcess(database, shadow=False)
    process = BanditProcess(database, clock=plain.clock)
    for _ in range(3):
        await plain.learn_one()
    decisions = [await process.decide() for _ in range(2)]
    statistics, mu = await known_to(process, decisions[0])
    padded = statistics.grown(SPEC_V2)
    await (process.bandit.maintenance.grow(math.inf) if how == "by a worker" else process.feed_back(decisions[1]))
    grown, _ = await known_to(process, decisions[0])
    assert y_of(grown)[SPEC_V1.size :].any()
    assert not y_of(padded)[SPEC_V1.size :].any()
    for decision in decisions:
        await assert_shadow(process, decision.id, padded, mu)


async def test_decision_is_made_anew_when_its_statistics_grow_meanwhile(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A request reads statistics; 2. a worker grows them; 3. the decision is refused and made anew. The number of
    learned decisions is the same, but a shadow computed later would be that of other statistics."""
    plain = BanditProcess(process.database, shadow=False, clock=process.clock)
    await plain.learn_one()
    await process.set_share(1.0)

    async def grow() -> None:
        await process.bandit.maintenance.grow(math.inf)

    decision = await acting_before_record(process, monkeypatch, grow).decide()
    assert (decision.role, decision.state_version, await process.stored()) == ("challenger", 1, 2)
    statistics, mu = await known_to(process, decision)
    assert y_of(statistics)[SPEC_V1.size :].any()
    await process.bandit.maintenance.shadow()
    await assert_shadow(process, decision.id, statistics, mu)
    await process.feed_back(decision)
    assert (await process.statistics()).decisions == 2
    await process.assert_learned_once()


async def test_request_fails_when_statistics_change_during_every_attempt(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = [await process.decide() for _ in range(10)]

    async def learn() -> None:
        await process.feed_back(earlier.pop())

    api = acting_before_record(process, monkeypatch, learn)
    with pytest.raises(StoreUnavailable, match="nothing was stored"):
        await api.decide()
    assert await process.stored() == 10


async def test_passes_continue_after_a_failed_one(process: BanditProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails, as a killed worker does, between reading and storing a page."""
    monkeypatch.setattr(maintenance, "SHADOWS_AT_ONCE", 3)
    monkeypatch.setattr(maintenance, "REST_S", 0)
    await process.decide_at_once(10)
    real, calls = process.database.write, 0

    async def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StoreUnavailable("locked")
        return await real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(process.database, "write", failing)
        with pytest.raises(StoreUnavailable):
            await process.bandit.maintenance.shadow()
    assert await process.stored("champion_p IS NOT NULL") == 3
    await process.bandit.maintenance.shadow()
    assert await process.stored("champion_p IS NOT NULL") == 10
    await process.assert_shadows()


async def test_nothing_is_stored_when_the_user_is_erased_meanwhile(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker computes shadows; 2. the user is erased; 3. the worker stores the shadows of the other users."""
    gone, kept = await process.decide("ann"), await process.decide("bob")
    real = process.database.write

    async def write(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(process.database, "write", real)
        await process.users.erase("ann", process.clock.now_ms())
        return await real(*arguments, **options)

    monkeypatch.setattr(process.database, "write", write)
    await process.bandit.maintenance.shadow()
    assert await process.rows("SELECT decision_id FROM tip_scores WHERE champion_p IS NOT NULL") == [(kept.id,)]
    with pytest.raises(NotFound):
        await process.bandit.scorer.explain(gone.id)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE bandit_priors SET mu = (SELECT theta FROM tip_scores LIMIT 1)",
        "UPDATE tip_scores SET request = '{}' WHERE state = 'open'",
    ],
    ids=["prior", "request"],
)
async def test_damage_loses_a_shadow_and_no_reward(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    log = Recorder()
    monkeypatch.setattr(shadows, "log", log)
    await process.learn_one()
    assert await process.pool()
    decision = await process.decide()
    await process.execute(damage)
    await process.bandit.maintenance.shadow()
    await process.feed_back(decision)
    assert [line["decisions"] for line in log.of("shadows_lost")] == [1]
    assert await process.rows("SELECT state, champion_p FROM tip_scores WHERE decision_id = ?", decision.id) == [
        ("learned", None)
    ]


async def test_damaged_statistics_stop_only_the_shadows_of_their_user(process: BanditProcess) -> None:
    for user in USERS:
        await process.learn_one(user)
        await process.decide(user)
    await process.execute(
        "UPDATE bandit_states SET evidence = (SELECT phi FROM tip_scores LIMIT 1) WHERE user_id = 'ann'"
    )
    await process.bandit.maintenance.shadow()
    assert await process.rows("SELECT user_id FROM tip_scores WHERE champion_p IS NULL") == [("ann",)]
    assert (await process.decide("ann")).state_version == 0


async def test_decision_without_a_challenger_never_gets_a_shadow(database: Database) -> None:
    """Neither from a process without a challenger, nor from one that has one when the decision is learned."""
    alone = BanditProcess(database, shadow=False)
    process = BanditProcess(database, clock=alone.clock)
    decision = await alone.decide()
    await process.set_share(1.0)
    assert (await alone.decide()).role == "champion"
    await alone.bandit.maintenance.shadow()
    await process.bandit.maintenance.shadow()
    await process.feed_back(decision)
    found, _ = await process.bandit.scorer.explain(decision.id)
    assert found.shadow is None
    assert len(found.phi) == SPEC_V1.size


async def test_no_shadow_is_computed_from_later_statistics(database: Database) -> None:
    """A worker without a challenger, or of an earlier release, has learned and stored no shadow."""
    alone = BanditProcess(database, shadow=False)
    process = BanditProcess(database, clock=alone.clock)
    first, second = await process.decide(), await process.decide()
    await alone.feed_back(first)
    await process.bandit.maintenance.shadow()
    await process.feed_back(second)
    assert (await process.stored("state = 'learned'"), await process.stored("champion_p IS NOT NULL")) == (2, 0)


async def test_pruned_decision_needs_no_shadow(process: BanditProcess) -> None:
    decision = await process.decide()
    process.clock.advance(HOUR_MS)
    assert await process.retention.prune(process.clock.now_ms(), 10) == 1
    await process.feed_back(decision)
    await process.bandit.maintenance.shadow()
    assert await process.stored() == 0


@pytest.mark.parametrize("how", ["erased", "pruned"])
async def test_shadow_of_the_pool_goes_with_its_decision(process: BanditProcess, how: str) -> None:
    await process.learn_one()
    assert await process.database.rows("SELECT COUNT(*) FROM pool_shadows") == [(1,)]
    if how == "erased":
        await process.users.erase("ann", process.clock.now_ms())
    else:
        assert await process.retention.prune(process.clock.now_ms() + 1, 10) == 1
    assert await process.database.rows("SELECT COUNT(*) FROM pool_shadows") == [(0,)]


@pytest.mark.parametrize("table", ["pool_shadows", "decision_events"])
async def test_rows_without_their_decision_are_deleted_by_retention(process: BanditProcess, table: str) -> None:
    """As on PostgreSQL: 1. an event reads its decision; 2. the decision is pruned; 3. the event is noted."""
    await process.learn_one()
    await process.database.execute("DELETE FROM tip_scores")
    await process.retention.prune(process.clock.now_ms(), 10)
    assert await process.rows(f"SELECT COUNT(*) FROM {table}") == [(0,)]
