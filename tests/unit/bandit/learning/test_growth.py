"""Growth by replay: a user who began under v1 has the statistics that v2 would have learned from the start."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.bandit.decisions import Decision
from app.bandit.learning.attribution import GRACE_MS
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Array, Context
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.stores.sql import learning
from app.stores.sql.database import Connection, Database
from app.stores.sql.sufficient_statistics import write_statistics
from tests.support.bandit_process import HOUR_MS, WINDOW_MS, BanditProcess
from tests.support.database import open_again, wipe
from tests.support.logs import Recorder
from tests.support.score_requests import same_bits, tip, y_of

pytestmark = pytest.mark.both_engines
USERS = ("ann", "bob")
TABLES = ("pool_shadows", "decision_events", "tip_scores", "bandit_states")
OLD = SPEC_V1.size


class Crash(Exception):
    """Stands for the death of the process."""


class Step(NamedTuple):
    """`challenger`: whether a process with a challenger makes the step, once there is one. `seed` decides the rest."""

    kind: str
    challenger: bool
    seed: int


class Result(NamedTuple):
    """Each user's statistics, and the decisions that were made."""

    statistics: dict[str, SufficientStatistics]
    decisions: list[Decision]


kinds = st.sampled_from(["decide"] * 4 + ["feedback"] * 3 + ["serve", "settle", "shadow", "grow"])
steps = st.lists(st.builds(Step, kinds, st.booleans(), st.integers(0, 10**6)), max_size=25)


async def take(steps: Sequence[Step], database: Database, challenger_from: int) -> Result:
    """Take the steps, from the same state with the same ids; from a step on, a process with a challenger takes part."""
    await wipe(database)
    for table in TABLES:
        await database.execute(f"DELETE FROM {table}")
    numbers = itertools.count(1)
    plain = BanditProcess(database, shadow=False, numbers=numbers)
    grown = BanditProcess(database, clock=plain.clock, numbers=numbers)
    grown.profiles = plain.profiles
    made: list[Decision] = []
    unsettled: list[Decision] = []
    for number, step in enumerate(steps):
        process = grown if number >= challenger_from and (step.challenger or not challenger_from) else plain
        random = Random(step.seed)
        plain.clock.advance(random.randrange(1, HOUR_MS))
        if step.kind == "decide":
            user = random.choice(USERS)
            plain.profiles[user] = {"completion_rate_30d": random.random(), "tip_volume_30d": random.randrange(99)}
            tips = tuple(
                tip(str(n), random.random() < 0.5, random.expovariate(0.1), random.gauss(0, 2)) for n in range(4)
            )
            at = datetime(2026, 3, 2, tzinfo=UTC) + timedelta(seconds=random.randrange(86_400))
            made.append(await process.decide(user, candidates=tips, context=Context(at)))
            unsettled.append(made[-1])
        elif step.kind == "settle":
            plain.clock.advance(random.choice([0, WINDOW_MS + GRACE_MS]))
            await process.bandit.maintenance.settle()
        elif step.kind == "shadow":
            await process.bandit.maintenance.shadow()
        elif step.kind == "grow":
            await process.bandit.maintenance.grow(math.inf)
        elif unsettled:
            decision = unsettled.pop(random.randrange(len(unsettled)))
            await (process.serve(decision) if step.kind == "serve" else process.feed_back(decision, "snoozed"))
        await plain.assert_learned_once()
    await grown.bandit.maintenance.grow(math.inf)
    users = [user for (user,) in await plain.rows("SELECT user_id FROM bandit_states")]
    return Result({user: await plain.statistics(user) for user in users}, made)


@settings(max_examples=settings().max_examples // 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.integers(1, 25))
async def test_replay_equals_learning_under_the_new_spec_from_the_start(
    database: Database, taken: list[Step], challenger_from: int
) -> None:
    """For any order of decisions, rewards, defaults, expirations and growth. The sums over v1's inputs and the
    champion's answers have the same bits. The others differ by rounding if decisions were learned at the same time."""
    expected = await take(taken, database, 0)
    found = await take(taken, database, challenger_from)
    assert found.statistics.keys() == expected.statistics.keys()
    for user, statistics in found.statistics.items():
        wanted = expected.statistics[user]
        assert (statistics.spec, statistics.decisions) == (SPEC_V2, wanted.decisions)
        assert all(map(same_bits, statistics.leading(OLD), wanted.leading(OLD)))
        np.testing.assert_allclose(statistics.numbers, wanted.numbers, rtol=0, atol=1e-12)
    for one, other in zip(found.decisions, expected.decisions, strict=True):
        assert (one.id, one.chosen, one.state_version) == (other.id, other.chosen, other.state_version)
        assert all(map(same_bits, one.ranking, other.ranking))


def full(decision: Decision) -> Array:
    """The input vector under v2 of the chosen candidate."""
    return np.asarray(SPEC_V2.phi(decision.candidates, decision.context, decision.profile)[decision.chosen])


async def began_under_v1(database: Database, decisions: int = 5) -> tuple[BanditProcess, list[Decision]]:
    """A process with a challenger, and decisions about ann that were learned before, with the reward 1."""
    plain = BanditProcess(database, shadow=False)
    made = []
    for number in range(decisions):
        plain.clock.advance(HOUR_MS)
        plain.profiles["ann"] = {"completion_rate_30d": number / 9, "tip_volume_30d": number, "preferred_hour": number}
        made.append(await plain.learn_one())
    assert (await plain.statistics()).spec == SPEC_V1
    return BanditProcess(database, clock=plain.clock), made


def assert_replayed(grown: SufficientStatistics, before: SufficientStatistics, made: Sequence[Decision]) -> None:
    """v1's part has not changed, and the rest is learned from these decisions, which have the reward 1."""
    expected = SufficientStatistics.none(SPEC_V2)
    for decision in made:
        expected = expected.learned(full(decision), 1.0)
    assert y_of(expected)[OLD:].any()
    assert (grown.spec, grown.decisions) == (SPEC_V2, before.decisions)
    assert same_bits(grown.numbers, before.grown(SPEC_V2, expected).numbers)
    assert all(map(same_bits, grown.leading(OLD), before.leading(OLD)))


def during_first_write(
    database: Database, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Awaitable[object]]
) -> None:
    """Let something happen before the next transaction begins."""
    real = database.write

    async def write(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(database, "write", real)
        await meanwhile()
        return await real(*arguments, **options)

    monkeypatch.setattr(database, "write", write)


async def test_only_pruned_decisions_are_padded(database: Database) -> None:
    process, made = await began_under_v1(database)
    before = await process.statistics()
    assert await process.retention.prune(made[2].created_at_ms, 10) == 2
    await process.bandit.maintenance.grow(math.inf)
    assert_replayed(await process.statistics(), before, made[2:])


async def test_only_decisions_with_a_damaged_request_are_padded(database: Database) -> None:
    process, made = await began_under_v1(database)
    before = await process.statistics()
    await process.execute("UPDATE tip_scores SET request = '{}' WHERE decision_id = ?", made[0].id)
    await process.bandit.maintenance.grow(math.inf)
    assert_replayed(await process.statistics(), before, made[1:])


@pytest.mark.parametrize("damage", ["statistics from a backup", "vector"])
async def test_statistics_are_padded_when_the_log_contradicts_them(
    database: Database, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    log = Recorder()
    monkeypatch.setattr(learning, "log", log)
    process, made = await began_under_v1(database)
    if damage == "vector":
        await process.execute("UPDATE tip_scores SET phi = ? WHERE decision_id = ?", bytes(7), made[0].id)
    else:
        backup = {"ann": SufficientStatistics.none(SPEC_V1).learned(made[0].phi, 1.0)}
        await database.write(lambda connection: write_statistics(connection, backup, 1), of=["ann"])
    before = await process.statistics()
    await process.bandit.maintenance.grow(math.inf)
    assert (await process.statistics()).pack() == before.grown(SPEC_V2).pack()
    assert len(log.of("log_not_replayed")) == 1


async def test_nothing_changes_when_a_worker_dies_during_growth(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, made = await began_under_v1(database)
    await process.decide()
    before = await process.statistics()

    def die(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(learning, "write_statistics", die)
        with pytest.raises(Crash):
            await process.bandit.maintenance.grow(math.inf)
    assert (await process.statistics()).pack() == before.pack()
    assert await process.stored("champion_p IS NOT NULL") == 0
    assert await process.bandit.maintenance.grow(math.inf)
    assert_replayed(await process.statistics(), before, made)
    assert await process.stored("champion_p IS NOT NULL") == 1


async def test_user_stays_padded_when_a_worker_of_an_earlier_release_grew_it_meanwhile(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker chooses users to grow; 2. a worker of an earlier release pads one; 3. the first worker leaves it."""
    plain = BanditProcess(database, shadow=False)
    await plain.learn_one()
    decision = await plain.decide()
    process = BanditProcess(database, clock=plain.clock)
    padded = (await process.statistics()).grown(SPEC_V2)

    def pad(connection: Connection) -> None:
        write_statistics(connection, {"ann": padded}, 1)

    during_first_write(database, monkeypatch, lambda: database.write(pad, of=["ann"]))
    assert await process.bandit.maintenance.grow(math.inf)
    assert (await process.statistics()).pack() == padded.pack()
    await process.feed_back(decision)
    assert (await process.statistics()).pack() == padded.learned(full(decision), 1.0).pack()


async def test_nothing_is_stored_when_the_user_is_erased_meanwhile(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker chooses users to grow; 2. one of them is erased; 3. the worker stores the others."""
    process, _ = await began_under_v1(database)
    during_first_write(database, monkeypatch, lambda: process.users.erase("ann", process.clock.now_ms()))
    assert await process.bandit.maintenance.grow(math.inf)
    assert not await process.has_learned()


async def test_user_grows_once_when_workers_choose_it_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, made = await began_under_v1(database)
    before = await process.statistics()
    stored: list[str] = []

    def counted(connection: Connection, evidence: Mapping[str, SufficientStatistics], now_ms: int) -> None:
        stored.extend(evidence)
        write_statistics(connection, evidence, now_ms)

    monkeypatch.setattr(learning, "write_statistics", counted)
    others = [await open_again(database) for _ in range(3)]
    try:
        workers = [BanditProcess(one, clock=process.clock) for one in (database, *others)]
        await asyncio.gather(*(worker.bandit.maintenance.grow(math.inf) for worker in workers))
    finally:
        for one in others:
            await one.close()
    assert stored == ["ann"]
    assert_replayed(await process.statistics(), before, made)


@pytest.mark.parametrize("how", ["feedback", "default", "maintenance"])
async def test_log_is_replayed_before_a_reward_is_learned(database: Database, how: str) -> None:
    process, made = await began_under_v1(database)
    plain = BanditProcess(database, shadow=False, clock=process.clock)
    waiting = await plain.decide()
    await plain.serve(waiting)
    rewards = [(decision, 1.0) for decision in made]
    if how == "feedback":
        await process.feed_back(waiting)
        rewards.append((waiting, 1.0))
    elif how == "default":
        process.clock.advance(WINDOW_MS + GRACE_MS + 1)
        assert await process.bandit.maintenance.settle() == 1
        rewards.append((waiting, 0.0))
    else:
        assert await process.bandit.maintenance.grow(math.inf)
    assert_learned(await process.statistics(), rewards)


def assert_learned(statistics: SufficientStatistics, rewards: Sequence[tuple[Decision, float]]) -> None:
    """The statistics are those that v2 would have learned from these decisions."""
    expected = SufficientStatistics.none(SPEC_V2)
    for decision, reward in rewards:
        expected = expected.learned(full(decision), reward)
    assert (statistics.spec, statistics.decisions) == (SPEC_V2, expected.decisions)
    np.testing.assert_allclose(statistics.numbers, expected.numbers, rtol=0, atol=1e-12)


async def test_decision_that_is_learned_during_the_replay_counts_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker replays ann's decisions; 2. a worker without a challenger learns another one; 3. the first worker
    stores nothing of the replay, and learns its decision after both."""
    process, made = await began_under_v1(database)
    plain = BanditProcess(database, shadow=False, clock=process.clock)
    second = await plain.decide()
    await plain.serve(second)
    process.clock.advance(WINDOW_MS + GRACE_MS + 1)
    first = await plain.decide()
    during_first_write(database, monkeypatch, lambda: plain.feed_back(first))
    assert await process.bandit.maintenance.settle() == 1
    assert_learned(await process.statistics(), [*((decision, 1.0) for decision in made), (first, 1.0), (second, 0.0)])
    await process.assert_learned_once()


async def test_replay_of_an_erased_user_is_not_stored(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. A worker replays ann's decision; 2. ann is erased, and one of her new decisions is learned, so that their
    number is the same; 3. the worker stores nothing of the replay."""
    process, _ = await began_under_v1(database, decisions=1)
    plain = BanditProcess(database, shadow=False, clock=process.clock)
    made: list[Decision] = []

    async def erase() -> None:
        await process.users.erase("ann", process.clock.now_ms())
        made.append(await plain.learn_one())

    during_first_write(database, monkeypatch, erase)
    assert await process.bandit.maintenance.grow(math.inf)
    assert_replayed(await process.statistics(), SufficientStatistics.none(SPEC_V1).learned(made[0].phi, 1.0), made)
