"""Replaying the log: the policies that ran make their decisions again, and no reward reaches an earlier decision."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.bandit.evaluation import (
    PriorsFromLog,
    Replay,
    in_order_of_learning,
    with_feature,
)
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Array, Input
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, POOLED_CHAMPION, Policy, Ranking
from app.bandit.ports import LoggedDecision, UserLog
from app.settings.parsers import PostgresUrl
from app.stores.sql.database import Database
from app.stores.sql.sufficient_statistics import write_statistics
from tests.support.bandit_process import BanditProcess
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import copy_database, open_database
from tests.support.lived_decisions import MINUTE_MS, live_through, write_log
from tests.support.score_requests import s_of, y_of

pytestmark = pytest.mark.both_engines


LIVED: Mapping[str, Any] = {"decisions": 160, "users": 6}


@pytest.fixture(scope="module")
def lived_template(migrated_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy_database(migrated_template, tmp_path_factory.mktemp("replay") / "profiles.db", "template")
    asyncio.run(write_log(path, **LIVED))
    return path


@pytest.fixture
async def process(store: Path | PostgresUrl, lived_template: Path) -> AsyncIterator[BanditProcess]:
    if isinstance(store, Path):
        copy_database(lived_template, store, "replay")
    database = await open_database(store, readers=2)
    if isinstance(store, Path):
        yield BanditProcess(database, clock=FakeClock(NOW_MS + LIVED["decisions"] * MINUTE_MS))
    else:
        yield await live_through(database, **LIVED)
    await database.close()


async def logs_of(process: BanditProcess) -> list[UserLog]:
    return await process.bandit.decisions.user_logs("", 10_000)


async def replayed(process: BanditProcess, policy: Policy) -> dict[int, Ranking]:
    replay = Replay(policy).recorded(await process.bandit.decisions.priors())
    assert replay is not None
    return rankings(replay, await logs_of(process))


def every(_: LoggedDecision) -> bool:
    return True


def rankings(replay: Replay, logs: Sequence[UserLog]) -> dict[int, Ranking]:
    return {item.number: ranking for log in logs for item, ranking in replay.rankings(log, every)}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [CHAMPION, CHALLENGER], ids=lambda policy: policy.id)
async def test_policies_that_ran_make_the_same_rankings(process: BanditProcess, policy: Policy) -> None:
    found = await replayed(process, policy)
    assert len(found) == 160
    for log in await logs_of(process):
        assert len({item.decision.prior_version for item in log.decisions}) > 1
        for item in log.decisions:
            made = item.decision
            stored = made.ranking if made.served_by == policy.id else made.shadow
            assert stored is not None
            assert np.array_equal(found[item.number].pi, stored.pi)
            assert np.array_equal(found[item.number].scores, stored.scores)


@pytest.mark.slow
async def test_logs_come_in_pages_of_whole_users(process: BanditProcess) -> None:
    after, found = "", []
    while logs := await process.bandit.decisions.user_logs(after, 40):
        assert len(logs) < 6
        found += logs
        after = logs[-1].user_id
    assert [log.user_id for log in found] == sorted(log.user_id for log in await logs_of(process))
    assert sum(len(log.decisions) for log in found) == 160


@pytest.mark.slow
async def test_pruned_decisions_keep_their_effect(process: BanditProcess) -> None:
    before = {policy.id: await replayed(process, policy) for policy in (CHAMPION, CHALLENGER)}
    await process.retention.prune(process.clock.now_ms() - 60 * 60_000, 1_000)
    assert 40 < await process.stored() < 80
    for policy in (CHAMPION, CHALLENGER):
        found = await replayed(process, policy)
        assert len(found) == await process.stored()
        for number, ranking in found.items():
            assert np.allclose(ranking.scores, before[policy.id][number].scores, rtol=0, atol=1e-9)
            assert np.allclose(ranking.pi, before[policy.id][number].pi, rtol=0, atol=1e-2)


async def grown_log(database: Database, *, padded: bool) -> BanditProcess:
    """A log whose first decisions were learned under v1, before the statistics grew: by a replay, or padded."""
    plain = BanditProcess(database, shadow=False)
    process = BanditProcess(database, clock=plain.clock)
    for number in range(20):
        plain.clock.advance(MINUTE_MS)
        plain.profiles["ann"] = {"completion_rate_30d": number / 20, "tip_volume_30d": 3 * number}
        if number == 12 and padded:
            longer = {"ann": (await plain.statistics()).grown(SPEC_V2)}
            await database.write(functools.partial(write_statistics, evidence=longer, now_ms=1), of=["ann"])
        elif number == 12:
            await process.bandit.maintenance.grow(math.inf)
            process.profiles = plain.profiles
        maker = plain if number < 12 else process
        await maker.feed_back(await maker.decide(), "completed" if number % 3 else "dismissed")
    return process


async def test_decisions_of_a_grown_user_count_once_when_older_ones_are_pruned(database: Database) -> None:
    process = await grown_log(database, padded=False)
    before = await replayed(process, CHALLENGER)
    assert await process.retention.prune(process.clock.now_ms() - 14 * MINUTE_MS, 1_000) == 5
    after = await replayed(process, CHALLENGER)
    assert len(after) == 15
    for number, ranking in after.items():
        np.testing.assert_allclose(ranking.scores, before[number].scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", [CHAMPION, CHALLENGER], ids=lambda policy: policy.id)
async def test_beginning_of_a_padded_user_has_the_inputs_of_every_logged_vector(
    database: Database, policy: Policy
) -> None:
    process = await grown_log(database, padded=True)
    (whole,) = await logs_of(process)
    assert await process.retention.prune(process.clock.now_ms() - 14 * MINUTE_MS, 1_000) == 5
    (log,) = await logs_of(process)
    found = Replay(policy).before(log, in_order_of_learning(log))
    expected = SufficientStatistics.none(policy.spec)
    for item in in_order_of_learning(whole)[:5]:
        expected = expected.learned(item.decision.phi, item.outcome.reward or 0.0)
    assert found.decisions == 5
    np.testing.assert_allclose(found.numbers, expected.numbers, rtol=0, atol=1e-12)


async def test_beginning_is_zeros_when_the_log_contradicts_the_statistics(database: Database) -> None:
    process = await grown_log(database, padded=False)
    other = {"ann": msgspec.structs.replace(SufficientStatistics.none(SPEC_V2), decisions=50)}
    await database.write(functools.partial(write_statistics, evidence=other, now_ms=1), of=["ann"])
    (log,) = await logs_of(process)
    found = Replay(CHALLENGER).before(log, in_order_of_learning(log))
    assert not found.numbers.any()
    assert found.decisions == 30
    assert len(await replayed(process, CHALLENGER)) == 20


@pytest.mark.slow
async def test_no_reward_reaches_its_own_decision_or_an_earlier_one(process: BanditProcess) -> None:
    """With priors from the log, too: the other reward of one decision changes later rankings only."""
    logs, stored = await logs_of(process), await process.bandit.decisions.priors()
    replay = Replay(with_feature(CHALLENGER, "x"), values={n: (n % 7) / 7 for n in range(200)})
    changed = sorted(item.number for log in logs for item in log.decisions)[60]

    def run(other: bool) -> dict[int, Ranking]:
        seen = [
            log._replace(decisions=[_flipped(item) if other and item.number == changed else item for item in log[2]])
            for log in logs
        ]
        pool = PriorsFromLog(replay, stored)
        for log in seen:
            pool.add(log)
        return rankings(pool.pooled(), seen)

    one, two = run(other=False), run(other=True)
    differs = {number for number in one if not np.array_equal(one[number].scores, two[number].scores)}
    assert differs
    assert min(differs) > changed
    owner = next(log for log in logs if any(item.number == changed for item in log.decisions))
    assert {item.number for item in owner.decisions if item.number > changed} <= differs
    assert differs - {item.number for item in owner.decisions}  # through the prior


def _flipped(item: LoggedDecision) -> LoggedDecision:
    assert item.outcome.reward is not None
    return item._replace(outcome=item.outcome._replace(reward=1.0 - item.outcome.reward))


async def test_priors_from_the_log_are_the_recorded_ones(process: BanditProcess) -> None:
    stored, logs = await process.bandit.decisions.priors(), await logs_of(process)
    pool = PriorsFromLog(Replay(CHALLENGER), stored)
    for log in logs:
        pool.add(log)
    assert len(stored) == 3
    known, pooled = Replay(CHALLENGER).recorded(stored), pool.pooled()
    assert known is not None
    for version in range(stored[-1].version + 2):
        assert np.allclose(pooled.mean(version), known.mean(version), rtol=0, atol=1e-12)
    assert not known.mean(0).any()
    shorter = Replay(POOLED_CHAMPION).recorded(stored)
    assert shorter is not None
    assert np.array_equal(shorter.mean(stored[0].version), stored[0].mu), "the policy reads the first inputs"


@pytest.mark.parametrize(
    ("replay", "pooled"),
    [
        (Replay(CHALLENGER), True),
        (Replay(POOLED_CHAMPION), False),
        (Replay(POOLED_CHAMPION, profiles=False), True),
        (Replay(CHAMPION, profiles=False), False),  # the policy reads no prior
    ],
)
def test_priors_are_pooled_from_the_log_when_a_recorded_one_does_not_fit(replay: Replay, pooled: bool) -> None:
    stored = [Prior(1, SPEC_V1, np.full(SPEC_V1.size, 0.1), 1, 50, 0), Prior.none(SPEC_V2)]
    assert (replay.recorded(stored) is None) == pooled


async def test_without_profiles_no_input_of_the_profile_counts(process: BanditProcess) -> None:
    (log, *_) = await logs_of(process)
    blind = [ranking for _, ranking in Replay(CHALLENGER, profiles=False).rankings(log, every)]
    plain = [ranking for _, ranking in Replay(CHAMPION).rankings(log, every)]
    seeing = [ranking for _, ranking in Replay(CHALLENGER).rankings(log, every)]
    assert all(np.allclose(one.scores, two.scores, atol=1e-9) for one, two in zip(blind, plain, strict=True))
    assert not all(np.allclose(one.scores, two.scores, atol=1e-9) for one, two in zip(blind, seeing, strict=True))


async def test_new_input_is_learned_from_the_first_decision_on(process: BanditProcess) -> None:
    (log, *_), policy = await logs_of(process), with_feature(POOLED_CHAMPION, "x")
    replay = Replay(policy, values={item.number: 0.5 for item in log.decisions})
    learned = in_order_of_learning(log)
    statistics = SufficientStatistics.none(policy.spec)
    for item in learned:
        statistics = replay.after(statistics, item)
    chosen = np.array([replay.phi(item)[item.decision.chosen] for item in learned])
    assert np.allclose(s_of(statistics), chosen.T @ chosen)
    assert np.allclose(chosen[:, SPEC_V1.size], 0.5 * chosen[:, 1])


class RecordingReplay(Replay, frozen=True):
    """Records the decisions whose input vectors it computes, and the versions of the priors that it reads."""

    computed: list[int] = msgspec.field(default_factory=list)
    read: list[int] = msgspec.field(default_factory=list)

    def mean(self, version: int) -> Array:
        self.read.append(version)
        return super().mean(version)

    def phi(self, item: LoggedDecision) -> Array:
        self.computed.append(item.number)
        return super().phi(item)


async def test_only_decisions_that_count_are_ranked_and_each_is_computed_once(process: BanditProcess) -> None:
    logs, whole = await logs_of(process), await replayed(process, CHALLENGER)
    replay = RecordingReplay(CHALLENGER).recorded(await process.bandit.decisions.priors())
    assert isinstance(replay, RecordingReplay)
    found = [pair for log in logs for pair in replay.rankings(log, lambda item: 80 < item.number <= 120)]
    assert sorted(item.number for item, _ in found) == [*range(81, 121)]
    assert all(np.array_equal(ranking.scores, whole[item.number].scores) for item, ranking in found)
    assert len(replay.read) == 40
    assert len(replay.computed) == len({*replay.computed})
    assert max(replay.computed) == 120


async def test_damaged_statistics_leave_their_user_out(process: BanditProcess) -> None:
    await process.execute("UPDATE bandit_states SET decisions = 1 WHERE user_id = 'user-0'")
    logs = await logs_of(process)
    assert {log.user_id for log in logs if log.statistics is None} == {"user-0"}
    found = await replayed(process, CHALLENGER)
    assert found.keys() == {item.number for log in logs if log.user_id != "user-0" for item in log.decisions}


def test_common_inputs_are_kept_and_others_are_zero() -> None:
    random = np.random.default_rng(1)
    statistics = SufficientStatistics.none(SPEC_V2)
    for _ in range(5):
        statistics = statistics.learned(random.uniform(-1, 1, SPEC_V2.size), 0.5)
    other = msgspec.structs.replace(SPEC_V1, inputs=(*SPEC_V1.inputs[:4], Input("new", shared="volume"), Input("more")))
    found = statistics.of_common_inputs(other)
    assert np.array_equal(s_of(found)[:4, :4], s_of(statistics)[:4, :4])
    assert np.array_equal(y_of(found)[:4], y_of(statistics)[:4])
    assert not s_of(found)[4:].any()
    assert not y_of(found)[4:].any()
    assert (found.decisions, found.spec.size) == (5, 6)
