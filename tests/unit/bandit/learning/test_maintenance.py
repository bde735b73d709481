"""Maintenance on a real database: pooling the prior, growing statistics, and damaged statistics and priors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from app.bandit.learning.maintenance import POOL_EVERY_MS
from app.bandit.model.inputs import SPEC_V1, SPEC_V2, SPECS, Spec
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics, pooled_mean, sound
from app.bandit.ports import StateGrowth
from app.concurrency.tasks import repeat
from app.errors import SpecMismatch, StoreUnavailable
from app.events.consume import ATTEMPTS
from app.stores.sql import sufficient_statistics
from app.stores.sql.database import Connection, Database
from app.stores.sql.learning import SqlLearning
from app.stores.sql.samples import backlog
from app.stores.sql.sufficient_statistics import damaged, write_statistics
from tests.support.bandit_process import HOUR_MS, WINDOW_MS, BanditProcess, feedback_for, inject_failures
from tests.support.clock import NOW_MS
from tests.support.logs import Recorder
from tests.support.score_requests import pool_of, s_of, y_of
from tests.support.waiting import eventually

pytestmark = pytest.mark.both_engines


def statistics_of(seed: int, *, grown: bool) -> SufficientStatistics:
    """Of one to three decisions."""
    random = np.random.default_rng(seed)
    spec = SPEC_V2 if grown else SPEC_V1
    statistics = SufficientStatistics.none(spec)
    for _ in range(1 + seed % 3):
        statistics = statistics.learned(random.uniform(-1, 1, spec.size), float(random.random()))
    return statistics


async def enroll(process: BanditProcess, users: int) -> list[SufficientStatistics]:
    """Store statistics of users, every second of them not grown."""
    states = [statistics_of(number, grown=number % 2 == 1) for number in range(users)]

    def work(connection: Connection) -> None:
        write_statistics(connection, {f"user-{number:04d}": one for number, one in enumerate(states)}, 1)

    await process.database.write(work, of=())
    return states


async def test_prior_is_pooled_over_all_users_when_they_have_grown(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.stores.sql.sufficient_statistics.PAGE", 7)
    states = await enroll(process, 40)
    everyone = [item if item.spec.size == SPEC_V2.size else item.grown(SPEC_V2) for item in states]
    for users, counted in ((20, everyone[1::2]), (40, everyone)):
        assert await process.pool(), "growth changes the sums, though nothing was learned"
        ((spec_hash, mu, *numbers),) = await process.rows(
            "SELECT spec_hash, mu, users, decisions FROM bandit_priors ORDER BY version DESC LIMIT 1"
        )
        assert (spec_hash, *numbers) == (SPEC_V2.hash, users, sum(item.decisions for item in counted))
        np.testing.assert_allclose(np.frombuffer(mu), pooled_mean(pool_of(counted)), atol=1e-12)
        assert await process.bandit.maintenance.grow(math.inf)
    decision = await process.decide("new")
    assert decision.prior_version == 2


async def test_prior_is_pooled_again_only_when_something_was_learned_or_erased(process: BanditProcess) -> None:
    pool = process.pool
    assert not await pool(), "there is nothing to pool"
    await process.learn_one()
    assert [await pool(), await pool()] == [True, False]
    await process.decide()
    assert not await pool(), "a decision alone teaches nothing"
    await process.learn_one("bob")
    assert [await pool(), await pool()] == [True, False]
    await process.users.erase("ann", process.clock.now_ms())
    assert [await pool(), await pool()] == [True, False]
    assert await process.rows("SELECT users, decisions FROM bandit_priors ORDER BY version") == [(1, 1), (2, 2), (1, 1)]


async def test_one_prior_is_stored_when_two_workers_pool_at_once(database: Database) -> None:
    workers = [BanditProcess(database), BanditProcess(database)]
    await workers[0].learn_one()
    assert sorted(await asyncio.gather(*(worker.pool() for worker in workers))) == [False, True]


async def test_statistics_of_another_release_are_left_out_of_the_prior(process: BanditProcess) -> None:
    await process.learn_one()
    await process.execute("INSERT INTO bandit_states VALUES ('bob', 'of another release', ?, 5, 1, NULL, NULL)", b"\0")
    assert await process.pool()
    assert await process.rows("SELECT users FROM bandit_priors") == [(1,)]


async def test_growth_continues_where_it_was_interrupted(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.stores.sql.learning.GROWN_AT_ONCE", 3)
    monkeypatch.setattr("app.bandit.learning.maintenance.REST_S", 0.0)
    states = await enroll(process, 20)
    inject_failures(monkeypatch, SqlLearning, "grow", [None, None, StoreUnavailable("locked")])
    with pytest.raises(StoreUnavailable):
        await process.bandit.maintenance.grow(math.inf)
    assert await process.bandit.states.growth() == StateGrowth(20, 4)
    assert not await process.bandit.maintenance.grow(-1), "the time is over after one page"
    assert await process.bandit.states.growth() == StateGrowth(20, 1)
    assert await process.bandit.maintenance.grow(math.inf)
    assert await process.bandit.states.growth() == StateGrowth(20, 0)
    for number, before in enumerate(states):
        after = await process.statistics(f"user-{number:04d}")
        assert after.decisions == before.decisions
        size = before.spec.size
        np.testing.assert_array_equal(s_of(after)[:size, :size], s_of(before))
        np.testing.assert_array_equal(y_of(after)[:size], y_of(before))
        assert not s_of(after)[size:].any()
        assert not y_of(after)[size:].any()


@pytest.mark.slow
async def test_every_user_with_statistics_is_counted(process: BanditProcess) -> None:
    await process.execute(
        """INSERT INTO bandit_states (user_id, spec_hash, evidence, decisions, updated_at_ms)
        WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100001)
        SELECT 'user-' || n, ?, ?, 1, 1 FROM numbers""",
        SPEC_V1.hash,
        b"",
    )
    assert await process.bandit.states.growth() == StateGrowth(100_001, 100_001)


async def test_decision_reads_statistics_that_have_not_grown(database: Database) -> None:
    plain, process = BanditProcess(database, shadow=False), BanditProcess(database)
    await plain.learn_one()
    before = await plain.statistics()
    decision = await process.decide()
    assert (decision.spec_hash, decision.state_version) == (SPEC_V2.hash, 1)
    await process.bandit.maintenance.grow(math.inf)
    after = await process.statistics()
    assert after.leading(before.spec.size)[0].tobytes() == s_of(before).tobytes()
    assert await process.stored(f"decision_id = '{decision.id}' AND challenger_p IS NOT NULL") == 1
    await plain.decide()
    assert await process.bandit.states.growth() == StateGrowth(1, 0), "what has grown stays so"


async def test_unreadable_statistics_are_kept_and_fail_no_decision(process: BanditProcess) -> None:
    await enroll(process, 1)
    await process.execute("UPDATE bandit_states SET evidence = ?", b"\0")
    decisions = await asyncio.gather(process.decide("user-0000"), process.decide("ann"))
    assert [item.state_version for item in decisions] == [0, 0]
    assert await process.rows("SELECT spec_hash, evidence FROM bandit_states") == [(SPEC_V1.hash, b"\0")]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The log lines about statistics and priors."""
    recorder = Recorder()
    for module in ("sufficient_statistics", "learning", "decisions"):
        monkeypatch.setattr(f"app.stores.sql.{module}.log", recorder)
    return recorder


DAMAGE = {
    "too short": lambda blob: blob[:-8],
    "no number": lambda blob: blob[:-8] + np.float64(np.nan).tobytes(),
    "not semidefinite": lambda blob: np.float64(-1.0).tobytes() + blob[8:],
    "first bit": lambda blob: bytes([blob[0] ^ 1]) + blob[1:],
    "last bit": lambda blob: blob[:-1] + bytes([blob[-1] ^ 128]),
}


async def damage(process: BanditProcess, user_id: str, how: Callable[[bytes], bytes]) -> bytes:
    """Damage a user's statistics; returns the damaged blob."""
    ((blob,),) = await process.rows("SELECT evidence FROM bandit_states WHERE user_id = ?", user_id)
    bad = how(blob)
    await process.execute("UPDATE bandit_states SET evidence = ? WHERE user_id = ?", bad, user_id)
    return bad


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("user_id", ["user-0000", "user-0001"], ids=["short", "grown"])
async def test_damaged_statistics_are_set_aside_and_other_users_are_not_affected(
    process: BanditProcess,
    user_id: str,
    how: Callable[[bytes], bytes],
    logged: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.stores.sql.learning.GROWN_AT_ONCE", 1)
    monkeypatch.setattr("app.bandit.learning.maintenance.REST_S", 0.0)
    states = await enroll(process, 8)
    bad = await damage(process, user_id, how)
    await process.bandit.maintenance.once()
    process.clock.advance(POOL_EVERY_MS)
    await process.learn_one()
    await process.bandit.maintenance.once()
    ((spec_hash, kept),) = await process.rows(
        "SELECT spec_hash, evidence FROM bandit_states WHERE user_id = ?", user_id
    )
    assert (spec_hash[:11], kept) == ("unreadable ", bad), "the row is kept, under the name of no spec"
    assert (await backlog(process.database, NOW_MS)).unreadable == 1
    assert await process.bandit.states.growth() == StateGrowth(8, 0), "the seven others have grown, and there is ann"
    rows = await process.rows("SELECT users, decisions FROM bandit_priors ORDER BY version")
    others = sum(item.decisions for item in states) - states[int(user_id[-1])].decisions
    assert rows == [(7, others), (8, others + 1)]
    (told,) = logged.lines
    assert told["event"] == "statistics_set_aside"
    assert (told["level"], told["user"][:12]) == ("warning", "user-sha256:")
    assert user_id not in str(told)


async def test_every_flipped_bit_is_found(process: BanditProcess) -> None:
    (intact,) = await enroll(process, 1)
    ((blob, decisions),) = await process.rows("SELECT evidence, decisions FROM bandit_states")
    flipped = [(bytes([*blob[:at], blob[at] ^ 1 << at % 8, *blob[at + 1 :]]), decisions) for at in range(len(blob))]
    for changed in [*flipped, *((blob, decisions ^ 1 << bit) for bit in range(8))]:
        await process.execute("UPDATE bandit_states SET evidence = ?, decisions = ?", *changed)
        with pytest.raises(SpecMismatch, match="are damaged"):
            await process.statistics("user-0000")
        assert await process.database.read(partial(damaged, whole=True)) == 1
    await process.execute("UPDATE bandit_states SET evidence = ?, decisions = ?", blob, decisions)
    assert (await process.statistics("user-0000")).pack() == intact.pack()


# What processes of the release before the checksums execute.
UPSERT_BEFORE = """
INSERT INTO bandit_states (user_id, spec_hash, evidence, decisions, updated_at_ms) VALUES ('ann', ?, ?, ?, 1)
ON CONFLICT (user_id) DO UPDATE SET
    spec_hash = excluded.spec_hash, evidence = excluded.evidence, decisions = excluded.decisions,
    updated_at_ms = excluded.updated_at_ms
"""
SELECT_BEFORE = "SELECT spec_hash, evidence, decisions FROM bandit_states WHERE user_id = 'ann'"
SELECT_CHECKSUMS = "SELECT header_crc32, evidence_crc32 FROM bandit_states WHERE user_id = 'ann'"


async def test_releases_with_and_without_checksums_take_turns(process: BanditProcess) -> None:
    first = await process.decide()
    short = statistics_of(0, grown=False)
    await process.execute(UPSERT_BEFORE, short.spec.hash, short.pack(), short.decisions)
    assert await process.rows(SELECT_CHECKSUMS) == [(None, None)]
    assert (await process.statistics()).pack() == short.pack()
    await process.feed_back(first)
    (checksums,) = await process.rows(SELECT_CHECKSUMS)
    assert None not in checksums, "the next write adds them"

    ((spec_hash, blob, decisions),) = await process.rows(SELECT_BEFORE)
    assert sound(SPECS[spec_hash], blob, decisions), "the other release can read it"
    read = SufficientStatistics.unpack(SPECS[spec_hash], blob, decisions)
    random = np.random.default_rng(1)
    learned = read.learned(random.uniform(-1, 1, read.spec.size), 0.5)
    for older in (learned, short, short.grown(SPEC_V2)):
        await process.execute(UPSERT_BEFORE, older.spec.hash, older.pack(), older.decisions)
        assert await process.rows(SELECT_CHECKSUMS) == [checksums], "of the row before"
        assert (await process.statistics()).pack() == older.pack()
    assert await process.database.read(partial(damaged, whole=True)) == 0
    await process.execute(UPSERT_BEFORE, SPEC_V1.hash, DAMAGE["not semidefinite"](short.pack()), short.decisions)
    with pytest.raises(SpecMismatch, match=r"of 1 decisions .* are damaged"):
        await process.statistics()


async def test_user_with_damaged_statistics_is_scored_as_new_and_loses_no_feedback(
    process: BanditProcess, logged: Recorder
) -> None:
    await process.learn_one()
    await process.learn_one("bob")
    ((blob, spec_hash),) = await process.rows("SELECT evidence, spec_hash FROM bandit_states WHERE user_id = 'ann'")
    await damage(process, "ann", DAMAGE["not semidefinite"])
    decisions = [await process.decide() for _ in range(3)]
    assert [item.state_version for item in decisions] == [0, 0, 0]
    assert [line["event"] for line in logged.lines] == ["statistics_refused"], "logged once"
    other = await process.decide("bob")
    await process.consumer.consume(await process.store(*(feedback_for(item, NOW_MS) for item in (decisions[0], other))))
    for _ in range(ATTEMPTS):
        await process.sweep()
    assert await process.states(other, decisions[0]) == ["learned", "open"]
    (letter,) = await process.rows("SELECT error FROM dead_letters")
    assert "SpecMismatch" in letter[0]
    ((aside,),) = await process.rows("SELECT spec_hash FROM bandit_states WHERE user_id = 'ann'")
    assert aside == f"unreadable {spec_hash}", "by the feedback already"
    # After the row is restored, learning continues.
    await process.execute("UPDATE bandit_states SET evidence = ?, spec_hash = ? WHERE user_id = 'ann'", blob, spec_hash)
    assert (await process.decide()).state_version == 1


@pytest.mark.parametrize("vector", [b"\0", np.full(SPEC_V2.size, 40.0).tobytes()], ids=["too short", "too large"])
async def test_other_decisions_are_settled_when_statistics_or_a_vector_are_damaged(
    process: BanditProcess, logged: Recorder, vector: bytes
) -> None:
    decisions = {user: [await process.decide(user), await process.decide(user)] for user in ("ann", "bob", "cid")}
    for user, (first, second) in decisions.items():
        await process.feed_back(first)
        await process.serve(second)
        await process.serve(await process.decide(user))
    await damage(process, "ann", DAMAGE["too short"])
    spoiled = decisions["bob"][1].id
    await process.execute("UPDATE tip_scores SET phi = ? WHERE decision_id = ?", vector, spoiled)
    process.clock.advance(WINDOW_MS + HOUR_MS)
    for _ in range(2):
        await process.bandit.maintenance.settle()
    settled = "SELECT user_id, COUNT(*) FROM tip_scores WHERE state = 'learned' GROUP BY user_id ORDER BY user_id"
    assert await process.rows(settled) == [("ann", 1), ("bob", 2), ("cid", 3)]
    ((spec, state),) = await process.rows("SELECT spec_hash, state FROM tip_scores WHERE decision_id = ?", spoiled)
    assert (spec, state) == (f"unreadable {SPEC_V2.hash}", "served")
    assert sorted(line["event"] for line in logged.lines) == ["decision_set_aside", "statistics_set_aside"]
    assert process.metric("decisions_settled_total", outcome="default") == 3
    assert process.metric("decisions_settled_total", outcome="set aside") == 3
    ((learned,),) = await process.rows("SELECT decisions FROM bandit_states WHERE user_id = 'bob'")
    assert learned == 2
    assert await process.database.read(lambda c: damaged(c, whole=True)) == 1, "a damaged vector damages no statistics"


PRIOR_DAMAGE = {
    "too short": lambda mu: mu[:-8],
    "cut in a number": lambda mu: mu[:-3],
    "no number": lambda mu: mu[:-8] + np.float64(np.nan).tobytes(),
    "infinite": lambda mu: np.float64(-np.inf).tobytes() + mu[8:],
    "more than any decisions teach": lambda mu: np.float64(1e3).tobytes() + mu[8:],
}


async def damage_prior(process: BanditProcess, version: int, how: Callable[[bytes], bytes]) -> None:
    ((mu,),) = await process.rows("SELECT mu FROM bandit_priors WHERE version = ?", version)
    await process.execute("UPDATE bandit_priors SET mu = ? WHERE version = ?", how(mu), version)


@pytest.mark.parametrize("how", PRIOR_DAMAGE.values(), ids=PRIOR_DAMAGE.keys())
async def test_damaged_prior_is_not_used_and_the_next_one_is(
    process: BanditProcess, how: Callable[[bytes], bytes], logged: Recorder
) -> None:
    for user_id in ("ann", "bob"):
        await process.learn_one(user_id)
        assert await process.pool()
    await damage_prior(process, 2, how)
    other = BanditProcess(process.database)  # a process that has used none
    decisions = [await other.decide() for _ in range(3)]
    assert [item.prior_version for item in decisions] == [0, 0, 0]
    assert np.isfinite(decisions[0].theta).all()
    assert [(line["event"], line["level"], line["version"]) for line in logged.lines] == [
        ("prior_refused", "warning", 2)
    ], "it is logged once"
    await process.learn_one("dan")
    assert await process.pool()
    assert (await other.decide()).prior_version == 3


async def test_cached_prior_is_used_when_a_newer_one_is_damaged(process: BanditProcess, logged: Recorder) -> None:
    await process.learn_one()
    assert await process.pool()
    assert (await process.decide()).prior_version == 1
    await process.learn_one("bob")
    assert await process.pool()
    await damage_prior(process, 2, PRIOR_DAMAGE["no number"])
    await damage_prior(process, 1, PRIOR_DAMAGE["no number"])
    assert (await process.decide()).prior_version == 1
    assert [line["version"] for line in logged.lines] == [2]


async def test_prior_is_used_when_a_process_has_once_failed_to_read_it(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await process.learn_one()
    assert await process.pool()
    failures = iter([StoreUnavailable("the connection was lost")])

    def prior_of(connection: Connection, spec: Spec, version: int) -> Prior:
        for failure in failures:
            raise failure
        return sufficient_statistics.prior_of(connection, spec, version)

    monkeypatch.setattr("app.stores.sql.decisions.prior_of", prior_of)
    other = BanditProcess(process.database)
    with suppress(StoreUnavailable):  # SQLite tries again
        await other.decide()
    assert (await other.decide()).prior_version == 1


async def test_champion_alone_reads_no_prior(database: Database, logged: Recorder) -> None:
    process = BanditProcess(database, shadow=False)
    await process.execute(
        "INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, 1, 1, 1, 1)",
        SPEC_V1.hash,
        b"damaged",
    )
    assert (await process.decide()).prior_version == 0
    assert not logged.lines


async def test_nothing_grows_without_a_challenger(database: Database) -> None:
    process = BanditProcess(database, shadow=False)
    await enroll(process, 4)
    assert await process.bandit.maintenance.grow(math.inf)
    assert await process.rows("SELECT COUNT(*) FROM bandit_states WHERE spec_hash = ?", SPEC_V1.hash) == [(2,)]
    assert await process.bandit.states.growth() == StateGrowth(4, 0)
    assert not await process.pool(), "the champion has no use for it"


async def test_maintenance_continues_after_failures_and_sets_the_metrics(
    process: BanditProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enroll(process, 4)
    inject_failures(monkeypatch, SqlLearning, "grow", [StoreUnavailable("locked"), ValueError("a defect")])
    task = asyncio.create_task(repeat("maintenance", process.bandit.maintenance.once, 0.0))
    await eventually(lambda: process.metric("prior_version") == 1)
    assert (process.metric("learned_states"), process.metric("states_to_grow")) == (4, 0)
    await process.learn_one()
    process.clock.advance(POOL_EVERY_MS)
    await eventually(lambda: process.metric("prior_version") == 2)
    task.cancel()
