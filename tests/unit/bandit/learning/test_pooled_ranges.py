"""Sums over ranges of users: equal to one sum over all users whose statistics have grown, whatever workers, learning,
growth and erasures do in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random

import numpy as np
import pytest

from app.bandit.learning.maintenance import POOL_EVERY_MS
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Spec
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics, pooled_mean
from app.stores.sql import sufficient_statistics as module
from app.stores.sql import users
from app.stores.sql.database import Database
from app.stores.sql.sufficient_statistics import SqlStates, write_statistics
from app.stores.sql.users import SqlUsers
from tests.support.bandit_process import BanditProcess
from tests.support.clock import NOW_MS
from tests.support.database import InterruptedDatabase
from tests.support.score_requests import pool_of

pytestmark = pytest.mark.both_engines
USERS = [f"user-{number:02d}" for number in range(14)]
SEEDS = 40


class Killed(Exception):
    """The worker dies here."""


class RandomRun:
    """Users learn and are erased, and workers sum ranges, at random; also between the transactions of a worker."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.random = Random(seed)
        self.states = SqlStates(database, SPEC_V2)
        self.users = SqlUsers(database)
        self.now_ms = NOW_MS
        self.round_ms = NOW_MS
        self.learned: dict[str, SufficientStatistics] = {}
        self.prior: Prior | None = None

    async def learn(self, user_id: str, decisions: int = 1, spec: Spec = SPEC_V2) -> None:
        for _ in range(decisions):
            known = self.learned.get(user_id) or SufficientStatistics.none(spec)
            phi = np.array([self.random.uniform(-1, 1) for _ in range(SPEC_V1.size)])
            self.learned[user_id] = known.learned(phi, self.random.random())
        await self.store(user_id)

    async def grow(self, user_id: str) -> None:
        if (known := self.learned.get(user_id)) is not None and known.spec == SPEC_V1:
            self.learned[user_id] = known.grown(SPEC_V2)
            await self.store(user_id)

    async def store(self, user_id: str) -> None:
        found = {user_id: self.learned[user_id]}
        await self.database.write(lambda connection: write_statistics(connection, found, self.now_ms), of=[user_id])

    async def erase(self, user_id: str) -> None:
        self.learned.pop(user_id, None)
        await self.users.erase(user_id, self.now_ms)

    async def begin_again(self, user_id: str) -> None:
        """Erase a user, who then learns from as many other decisions."""
        known = self.learned.get(user_id)
        await self.erase(user_id)
        if known is not None:
            await self.learn(user_id, known.decisions)

    async def sum_range(self, depth: int) -> None:
        async def interrupt() -> None:
            if self.random.random() < 0.1:
                raise Killed
            while self.random.random() < 0.4:
                await self.step(depth + 1)

        worker = SqlStates(InterruptedDatabase(self.database, interrupt, interrupt), SPEC_V2)
        with suppress(Killed):
            await worker.sum_range(self.round_ms, self.now_ms)

    async def pool(self) -> None:
        self.prior = await self.states.pool(self.now_ms) or self.prior

    async def step(self, depth: int = 0) -> None:
        self.now_ms += self.random.randint(0, 3)
        user_id = self.random.choice(USERS)
        kind = self.random.random()
        if kind < 0.3:
            await self.learn(user_id, spec=self.random.choice((SPEC_V1, SPEC_V2)))
        elif kind < 0.4:
            await self.begin_again(user_id)
        elif kind < 0.5:
            await self.erase(user_id)
        elif kind < 0.6:
            await self.grow(user_id)
        elif kind < 0.65:
            self.now_ms += 1
            self.round_ms = self.now_ms
        elif kind < 0.7:
            await self.pool()
        elif depth < 2:
            await self.sum_range(depth)

    async def faults(self) -> list[str]:
        """Run, and then sum everything in one more round. Return what differs from one sum over all users."""
        for table in ("pooled_ranges", "bandit_states", "bandit_priors"):
            await self.database.execute(f"DELETE FROM {table}")
        for _ in range(60):
            await self.step()
        self.now_ms += 1
        self.round_ms = self.now_ms
        while await self.states.sum_range(self.round_ms, self.now_ms):
            pass
        await self.pool()
        kept = {first for (first,) in await self.database.rows("SELECT first_user FROM pooled_ranges")}
        grown = [item for item in self.learned.values() if item.spec == SPEC_V2]
        one = pool_of(grown)
        found = self.prior or Prior.none(SPEC_V2)
        faults = [f"{first} is erased, and begins a range" for first in kept - self.learned.keys() - {""}]
        if (found.users, found.decisions) != (len(grown), one.decisions):
            faults.append(f"{found.users} users and {found.decisions} decisions, not {len(grown)} and {one.decisions}")
        if not np.allclose(found.mu, pooled_mean(one), rtol=0, atol=1e-12):
            faults.append("the mean differs by more than rounding")
        return faults


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANGE_USERS", 2)
    monkeypatch.setattr(module, "PAGE", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("small_ranges")
async def test_sums_over_ranges_equal_one_sum_whatever_happens_in_between(database: Database) -> None:
    for seed in range(SEEDS):
        assert not await RandomRun(database, seed).faults(), f"seed {seed}"


KNOWN = "(SELECT decisions FROM pooled_ranges WHERE first_user = :first)"
FORGETFUL = {
    "learning": ("SELECT_LEARNED", module.SELECT_LEARNED.replace("SUM(decisions)", f"MAX({KNOWN})")),
    "an erasure": ("UPDATE_ERASED_SUM", users.UPDATE_ERASED_SUM.replace("WHERE", "WHERE FALSE AND")),
    "the id of an erased user": ("DELETE_ERASED_FIRST", users.DELETE_ERASED_FIRST.replace("WHERE", "WHERE FALSE AND")),
    "an erasure during the sum": ("UPDATE_SUM", module.UPDATE_SUM.replace("AND claimed_at_ms = :now", "")),
}


@pytest.mark.slow
@pytest.mark.usefixtures("small_ranges")
@pytest.mark.parametrize("forgotten", FORGETFUL)
async def test_forgotten_change_is_found(database: Database, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    name, mutant = FORGETFUL[forgotten]
    owner = module if hasattr(module, name) else users
    assert mutant != getattr(owner, name)
    monkeypatch.setattr(owner, name, mutant)
    for seed in range(10 * SEEDS):
        if await RandomRun(database, seed).faults():
            return
    pytest.fail("no run has found it")


@pytest.mark.usefixtures("small_ranges")
async def test_each_range_is_summed_once_in_a_round_by_several_workers(database: Database) -> None:
    run = RandomRun(database, 1)
    for user_id in USERS:
        await run.learn(user_id)
    workers = [BanditProcess(database) for _ in range(3)]
    sums = [worker.bandit.maintenance.sum_ranges(NOW_MS, 1e9) for worker in workers]
    assert all(await asyncio.gather(*sums))
    rows = await database.rows("SELECT revision, users FROM pooled_ranges ORDER BY first_user")
    assert rows == [(1, 2)] * 5 + [(1, 4)]


@pytest.mark.usefixtures("small_ranges")
async def test_prior_is_the_same_to_the_last_bit_when_workers_die(database: Database) -> None:
    run, random = RandomRun(database, 1), Random(1)
    for user_id in USERS:
        await run.learn(user_id)
    priors = []

    async def killed() -> None:
        await asyncio.sleep(0)
        if random.random() < 0.2:
            raise Killed

    async def work() -> None:
        states = SqlStates(InterruptedDatabase(database, killed, killed), SPEC_V2)
        with suppress(Killed):
            while await states.sum_range(NOW_MS, NOW_MS):
                pass

    for workers in (0, 4):
        await asyncio.gather(*(work() for _ in range(workers)))
        while await run.states.sum_range(NOW_MS + 1, NOW_MS + 1):
            pass
        found = await run.states.pool(NOW_MS)
        assert found is not None
        priors.append(found)
        await database.execute("DELETE FROM pooled_ranges")
    assert priors[0].mu.tobytes() == priors[1].mu.tobytes()
    assert priors[0].users == priors[1].users == len(USERS)


@pytest.mark.usefixtures("small_ranges")
async def test_only_changed_ranges_are_summed_again(database: Database) -> None:
    run, process = RandomRun(database, 1), BanditProcess(database)
    for user_id in USERS:
        await run.learn(user_id)
    assert await process.pool()
    await run.learn(USERS[5])
    assert await process.pool()
    rows = await database.rows("SELECT revision FROM pooled_ranges ORDER BY first_user")
    assert [revision for (revision,) in rows] == [1, 1, 2, 1, 1, 1]


@pytest.mark.usefixtures("small_ranges")
async def test_round_continues_at_the_next_step_when_the_time_is_over(process: BanditProcess) -> None:
    run = RandomRun(process.database, 1)
    for user_id in USERS:
        await run.learn(user_id)
    maintenance = process.bandit.maintenance
    for ranges in range(1, 7):
        assert not await maintenance.sum_ranges(NOW_MS, -1)
        rows = await process.rows("SELECT COUNT(users) FROM pooled_ranges")
        assert rows == [(ranges - 1,)], "the first step stores the first range"
    assert not await maintenance.sum_ranges(NOW_MS, -1)
    assert await maintenance.sum_ranges(NOW_MS, -1)


@pytest.mark.usefixtures("small_ranges")
async def test_no_prior_is_made_until_every_range_has_a_sum(process: BanditProcess) -> None:
    run = RandomRun(process.database, 1)
    for user_id in USERS:
        await run.learn(user_id)
    await process.bandit.maintenance.sum_ranges(NOW_MS, -1)
    await process.bandit.maintenance.sum_ranges(NOW_MS, -1)
    assert not await process.bandit.maintenance.pool()
    assert await process.pool()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "too short": lambda evidence: evidence[:-1],
    "changed": lambda evidence: bytes(7) + b"\xc0" + evidence[8:],
}


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
async def test_damaged_sum_is_not_used_and_made_again(process: BanditProcess, how: Callable[[bytes], bytes]) -> None:
    await process.learn_one("ann")
    await process.bandit.maintenance.sum_ranges(process.clock.now_ms(), 1e9)
    ((evidence,),) = await process.rows("SELECT evidence FROM pooled_ranges")
    await process.execute("UPDATE pooled_ranges SET evidence = ?", how(evidence))
    assert not await process.pool(), "the counts are right, so it is only found now"
    assert await process.pool()
    assert await process.rows("SELECT users, decisions FROM bandit_priors") == [(1, 1)]


async def test_claim_from_the_future_does_not_last(process: BanditProcess) -> None:
    """It was made by a clock that was ahead."""
    await process.learn_one("ann")
    assert await process.pool()
    await process.execute("UPDATE pooled_ranges SET claimed_at_ms = ?", NOW_MS + 2 * POOL_EVERY_MS)
    await process.learn_one("bob")
    assert await process.pool()


async def test_sums_of_another_spec_stay_apart(process: BanditProcess) -> None:
    await process.learn_one("ann")
    await process.execute("INSERT INTO pooled_ranges VALUES ('another', '', 0, 90, 5, 9, ?)", bytes(9))
    assert await process.pool()
    assert await process.rows("SELECT users FROM bandit_priors") == [(1,)]


async def test_ranges_that_were_lost_lead_to_a_newer_prior(process: BanditProcess) -> None:
    for _ in range(3):
        await process.learn_one("ann")
        assert await process.pool()
    await process.execute("DELETE FROM pooled_ranges")
    await process.learn_one("bob")
    assert await process.pool()
    assert await process.rows("SELECT version, users FROM bandit_priors ORDER BY version DESC LIMIT 1") == [(4, 2)]


async def test_pool_of_sums_equals_the_pool_of_their_users() -> None:
    random = np.random.default_rng(1)
    users = [
        SufficientStatistics.none(SPEC_V2).learned(random.uniform(-1, 1, SPEC_V2.size), random.random())
        for _ in range(30)
    ]
    sums = [pool_of(users[:10]), pool_of(users[10:])]
    whole = SufficientStatistics.none(SPEC_V2).plus([pool.pack() for pool in sums], 30)
    one = pool_of(users)
    assert whole.decisions == one.decisions == 30
    np.testing.assert_allclose(pooled_mean(whole), pooled_mean(one), rtol=0, atol=1e-14)
