"""Upkeep on a real database: the prior is pooled when something was learned, and evidence grows page by page."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest

from app.bandit.learning.maintenance import POOL_EVERY_S
from app.bandit.model.pooled_prior import Pool, Prior
from app.bandit.model.specs import SPEC_V1, SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.concurrency.periodic import repeat
from app.errors import StoreUnavailable
from app.events.consume import ATTEMPTS
from app.stores.sqlite.database import Database
from app.stores.sqlite.outbox import backlog
from app.stores.sqlite.priors import newest_prior
from app.stores.sqlite.states import SqliteStates, damaged, write_evidence
from tests.support.events import feedback, served
from tests.support.learning import HOUR_MS, WINDOW_MS, School
from tests.support.logs import Recorder
from tests.support.waiting import eventually


@pytest.fixture
async def school(database: Database) -> School:
    """A process with a challenger."""
    return School(database)


def evidence_of(seed: int, *, grown: bool) -> SufficientStatistics:
    """Some decisions' worth."""
    random = np.random.default_rng(seed)
    spec = SPEC_V2 if grown else SPEC_V1
    evidence = SufficientStatistics.none(spec)
    for _ in range(1 + seed % 3):
        evidence = evidence.learned(random.uniform(-1, 1, spec.size), float(random.random()))
    return evidence


async def enroll(school: School, users: int) -> list[SufficientStatistics]:
    """Users with evidence; every second has not grown."""
    states = [evidence_of(number, grown=number % 2 == 1) for number in range(users)]

    def work(connection: object) -> None:
        named = {f"user-{number:04d}": evidence for number, evidence in enumerate(states)}
        write_evidence(connection, named, 1)  # type: ignore[arg-type]
        connection.execute("UPDATE bandit_ledger SET changes = changes + 1")  # type: ignore[attr-defined]

    await school.database.write(work)
    return states


async def learn_one(school: School, user_id: str = "ann") -> None:
    """One decision and its reward."""
    decision = await school.decide(user_id)
    await school.tell(feedback(user_id, tip_id=decision.chosen_id, decision_id=decision.id))


async def test_prior_is_pooled_over_all_users_grown_or_not(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.stores.sqlite.states.PAGE", 7)
    states = await enroll(school, 40)
    assert await school.bandit.maintenance.pool()
    pool = Pool(SPEC_V2)
    for evidence in states:
        pool.add(evidence)
    ((version, spec_hash, mu, users, decisions),) = await school.rows(
        "SELECT version, spec_hash, mu, users, decisions FROM bandit_priors"
    )
    assert (version, spec_hash, users, decisions) == (1, SPEC_V2.hash, 40, sum(item.decisions for item in states))
    np.testing.assert_allclose(np.frombuffer(mu), pool.mean(), atol=1e-12)
    decision = await school.decide("new")
    assert decision.prior_version == 1


async def test_prior_is_pooled_again_only_when_something_was_learned_or_erased(school: School) -> None:
    pool = school.bandit.maintenance.pool
    assert not await pool(), "there is nothing to pool"
    await learn_one(school)
    assert [await pool(), await pool()] == [True, False]
    await school.decide()
    assert not await pool(), "a decision alone teaches nothing"
    await learn_one(school, "bob")
    assert [await pool(), await pool()] == [True, False]
    await school.users.erase("ann", school.clock.now_ms())
    assert [await pool(), await pool()] == [True, False]
    assert await school.rows("SELECT users, decisions FROM bandit_priors ORDER BY version") == [(1, 1), (2, 2), (1, 1)]


async def test_one_prior_is_stored_when_two_workers_pool_at_once(database: Database) -> None:
    workers = [School(database), School(database)]
    await learn_one(workers[0])
    assert sorted(await asyncio.gather(*(worker.bandit.maintenance.pool() for worker in workers))) == [False, True]


async def test_evidence_of_another_release_is_left_out_of_the_prior(school: School) -> None:
    await learn_one(school)
    await school.database.write(
        lambda c: c.execute("INSERT INTO bandit_states VALUES ('bob', 'of another release', x'00', 5, 1)")
    )
    assert await school.bandit.maintenance.pool()
    assert await school.rows("SELECT users FROM bandit_priors") == [(1,)]


async def test_evidence_grows_page_by_page_and_goes_on_where_it_was_cut_short(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.learning.maintenance.GROWN_AT_ONCE", 3)
    monkeypatch.setattr("app.bandit.learning.maintenance.REST_S", 0.0)
    states = await enroll(school, 20)
    real, pages = SqliteStates.grow, iter([None, None, StoreUnavailable("locked")])

    async def grow(book: SqliteStates, limit: int, now_ms: int) -> int:
        if (failure := next(pages, None)) is not None:
            raise failure
        return await real(book, limit, now_ms)

    monkeypatch.setattr(SqliteStates, "grow", grow)
    with pytest.raises(StoreUnavailable):
        await school.bandit.maintenance.grow()
    assert await school.bandit.states.counts() == {SPEC_V1.hash: 4, SPEC_V2.hash: 16}
    assert await school.bandit.maintenance.grow() == 4
    assert await school.bandit.states.counts() == {SPEC_V2.hash: 20}
    for number, before in enumerate(states):
        after = await school.evidence(f"user-{number:04d}")
        assert after is not None
        assert after.decisions == before.decisions
        size = before.size
        np.testing.assert_array_equal(after.s[:size, :size], before.s)
        np.testing.assert_array_equal(after.y[:size], before.y)
        assert not after.s[size:].any()
        assert not after.y[size:].any()
    assert await school.bandit.maintenance.grow() == 0


async def test_evidence_grows_when_it_is_read_for_a_decision(database: Database) -> None:
    plain, school = School(database, shadow=False), School(database)
    await learn_one(plain)
    before = await plain.evidence()
    await plain.decide()
    assert await school.bandit.states.counts() == {SPEC_V1.hash: 1}, "there is nothing to grow to"
    decision = await school.decide()
    after = await school.evidence()
    assert before is not None
    assert after is not None
    assert (after.spec_hash, after.decisions) == (SPEC_V2.hash, 1) == (decision.spec_hash, decision.state_version)
    assert after.pack() == before.grown(SPEC_V1, SPEC_V2).pack()
    await plain.decide()
    assert await school.bandit.states.counts() == {SPEC_V2.hash: 1}, "what has grown stays so"


async def test_evidence_that_cannot_be_read_stays_as_it_is_and_fails_no_decision(school: School) -> None:
    await enroll(school, 1)
    await school.database.write(lambda c: c.execute("UPDATE bandit_states SET evidence = x'00'"))
    decisions = await asyncio.gather(school.decide("user-0000"), school.decide("ann"))
    assert [item.state_version for item in decisions] == [0, 0]
    assert await school.rows("SELECT spec_hash, evidence FROM bandit_states") == [(SPEC_V1.hash, b"\0")]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What is logged of evidence."""
    recorder = Recorder()
    for module in ("states", "learning", "decisions", "priors"):
        monkeypatch.setattr(f"app.stores.sqlite.{module}.log", recorder)
    return recorder


DAMAGE = {
    "too short": lambda blob: blob[:-8],
    "no number": lambda blob: blob[:-8] + np.float64(np.nan).tobytes(),
    "not semidefinite": lambda blob: np.float64(-1.0).tobytes() + blob[8:],
}


async def damage(school: School, user_id: str, how: Callable[[bytes], bytes]) -> bytes:
    """Spoil a user's evidence; as it is now."""
    ((blob,),) = await school.rows("SELECT evidence FROM bandit_states WHERE user_id = ?", user_id)
    bad = how(blob)
    await school.database.write(
        lambda c: c.execute("UPDATE bandit_states SET evidence = ? WHERE user_id = ?", (bad, user_id))
    )
    return bad


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("user_id", ["user-0000", "user-0001"], ids=["short", "grown"])
async def test_damaged_evidence_is_set_aside_and_everybody_elses_goes_on(
    school: School, user_id: str, how: Callable[[bytes], bytes], said: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.bandit.learning.maintenance.GROWN_AT_ONCE", 1)
    monkeypatch.setattr("app.bandit.learning.maintenance.REST_S", 0.0)
    states = await enroll(school, 8)
    bad = await damage(school, user_id, how)
    await school.bandit.maintenance.once()
    school.clock.advance(int(POOL_EVERY_S * 1000))
    await learn_one(school)
    await school.bandit.maintenance.once()
    ((spec_hash, kept),) = await school.rows("SELECT spec_hash, evidence FROM bandit_states WHERE user_id = ?", user_id)
    assert (spec_hash[:11], kept) == ("unreadable ", bad), "it stays as it is, under no spec"
    assert (await backlog(school.database)).unreadable == 1
    assert (await school.bandit.states.counts())[SPEC_V2.hash] == 8, "the seven others have grown, and there is ann"
    rows = await school.rows("SELECT users, decisions FROM bandit_priors ORDER BY version")
    others = sum(item.decisions for item in states) - states[int(user_id[-1])].decisions
    assert rows == [(7, others), (8, others + 1)]
    (told,) = said.lines
    assert told["event"] == "evidence_set_aside"
    assert (told["level"], told["user"][:12]) == ("warning", "user-sha256:")
    assert user_id not in str(told)


async def test_user_whose_evidence_is_damaged_is_scored_as_a_new_one_and_loses_no_feedback(
    school: School, said: Recorder
) -> None:
    await learn_one(school)
    await learn_one(school, "bob")
    ((blob, spec_hash),) = await school.rows("SELECT evidence, spec_hash FROM bandit_states WHERE user_id = 'ann'")
    await damage(school, "ann", DAMAGE["not semidefinite"])
    decisions = [await school.decide() for _ in range(3)]
    assert [item.state_version for item in decisions] == [0, 0, 0]
    assert [line["event"] for line in said.lines] == ["evidence_refused"], "said once"
    told = feedback("ann", tip_id=decisions[0].chosen_id, decision_id=decisions[0].id)
    other = await school.decide("bob")
    seqs = await school.store(told, feedback("bob", tip_id=other.chosen_id, decision_id=other.id))
    await school.consumer.consume(seqs)
    for _ in range(ATTEMPTS):
        await school.sweep()
    assert (await school.outcome(other)).state == "learned"
    assert (await school.outcome(decisions[0])).state == "open"
    (letter,) = await school.rows("SELECT error FROM dead_letters")
    assert "SpecMismatch" in letter[0]
    ((aside,),) = await school.rows("SELECT spec_hash FROM bandit_states WHERE user_id = 'ann'")
    assert aside == f"unreadable {spec_hash}", "by the feedback already"
    # Put back, it goes on where it was.
    await school.database.write(
        lambda c: c.execute(
            "UPDATE bandit_states SET evidence = ?, spec_hash = ? WHERE user_id = 'ann'", (blob, spec_hash)
        )
    )
    assert (await school.decide()).state_version == 1


@pytest.mark.parametrize("vector", [b"\0", np.full(SPEC_V2.size, 40.0).tobytes()], ids=["too short", "too large"])
async def test_sweep_settles_everybody_else_when_evidence_or_a_vector_is_damaged(
    school: School, said: Recorder, vector: bytes
) -> None:
    decisions = {user: [await school.decide(user), await school.decide(user)] for user in ("ann", "bob", "cid")}
    for user, (first, _) in decisions.items():
        await school.tell(feedback(user, tip_id=first.chosen_id, decision_id=first.id))
        second = decisions[user][1]
        await school.tell(served(user, tip_id=second.chosen_id, decision_id=second.id))
        third = await school.decide(user)
        await school.tell(served(user, tip_id=third.chosen_id, decision_id=third.id))
    await damage(school, "ann", DAMAGE["too short"])
    spoiled = decisions["bob"][1].id
    await school.database.write(
        lambda c: c.execute("UPDATE tip_scores SET phi = ? WHERE decision_id = ?", (vector, spoiled))
    )
    school.clock.advance(WINDOW_MS + HOUR_MS)
    for _ in range(2):
        await school.bandit.learner.settle()
    settled = "SELECT user_id, COUNT(*) FROM tip_scores WHERE state = 'learned' GROUP BY user_id ORDER BY user_id"
    assert await school.rows(settled) == [("ann", 1), ("bob", 2), ("cid", 3)]
    ((spec, state),) = await school.rows("SELECT spec_hash, state FROM tip_scores WHERE decision_id = ?", spoiled)
    assert (spec, state) == (f"unreadable {SPEC_V2.hash}", "served")
    assert sorted(line["event"] for line in said.lines) == ["decision_set_aside", "evidence_set_aside"]
    counted = school.metrics.collectors.get_sample_value
    assert counted("profiles_decisions_settled_total", {"outcome": "default"}) == 3
    assert counted("profiles_decisions_settled_total", {"outcome": "set aside"}) == 3
    ((learned,),) = await school.rows("SELECT decisions FROM bandit_states WHERE user_id = 'bob'")
    assert learned == 2
    assert await school.database.read(lambda c: damaged(c, whole=True)) == 1, "one vector spoils nobody's evidence"


PRIOR_DAMAGE = {
    "too short": lambda mu: mu[:-8],
    "cut in a number": lambda mu: mu[:-3],
    "no number": lambda mu: mu[:-8] + np.float64(np.nan).tobytes(),
    "infinite": lambda mu: np.float64(-np.inf).tobytes() + mu[8:],
    "more than any decisions teach": lambda mu: np.float64(1e3).tobytes() + mu[8:],
}


async def damage_prior(school: School, version: int, how: Callable[[bytes], bytes]) -> bytes:
    """Spoil one; as it was."""
    ((mu,),) = await school.rows("SELECT mu FROM bandit_priors WHERE version = ?", version)
    await school.database.write(
        lambda c: c.execute("UPDATE bandit_priors SET mu = ? WHERE version = ?", (how(mu), version))
    )
    return bytes(mu)


@pytest.mark.parametrize("how", PRIOR_DAMAGE.values(), ids=PRIOR_DAMAGE.keys())
async def test_decisions_go_on_with_the_newest_sound_prior_when_the_newest_is_damaged(
    school: School, how: Callable[[bytes], bytes], said: Recorder
) -> None:
    for user_id in ("ann", "bob", "cid"):
        await learn_one(school, user_id)
        assert await school.bandit.maintenance.pool()
    for version in (2, 3):
        await damage_prior(school, version, how)
    other = School(school.database)  # a process that knows none of them
    decisions = [await other.decide() for _ in range(3)]
    assert [item.prior_version for item in decisions] == [1, 1, 1]
    assert np.isfinite(decisions[0].theta).all()
    assert [(line["event"], line["level"], line["version"]) for line in said.lines] == [
        ("prior_refused", "warning", 3),
        ("prior_refused", "warning", 2),
    ], "each is said once"
    await learn_one(school, "dan")
    assert await school.bandit.maintenance.pool()
    assert (await other.decide()).prior_version == 4


async def test_decisions_go_on_without_a_prior_when_the_only_one_is_damaged(school: School, said: Recorder) -> None:
    await learn_one(school)
    assert await school.bandit.maintenance.pool()
    await damage_prior(school, 1, PRIOR_DAMAGE["too short"])
    assert (await school.decide()).prior_version == 0
    assert len(said.lines) == 1


async def test_prior_that_is_known_stays_known_when_a_newer_one_is_damaged(school: School, said: Recorder) -> None:
    await learn_one(school)
    assert await school.bandit.maintenance.pool()
    assert (await school.decide()).prior_version == 1
    await learn_one(school, "bob")
    assert await school.bandit.maintenance.pool()
    await damage_prior(school, 2, PRIOR_DAMAGE["no number"])
    await damage_prior(school, 1, PRIOR_DAMAGE["no number"])
    assert (await school.decide()).prior_version == 1
    assert [line["version"] for line in said.lines] == [2]


async def test_a_champion_alone_looks_for_no_prior() -> None:
    with closing(sqlite3.connect(":memory:")) as nothing:
        known = Prior.none(SPEC_V1)
        assert newest_prior(nothing, SPEC_V1, known, set()) is known


async def test_nothing_grows_without_a_challenger(database: Database) -> None:
    school = School(database, shadow=False)
    await enroll(school, 4)
    assert await school.bandit.maintenance.grow() == 0
    assert await school.bandit.states.counts() == {SPEC_V1.hash: 2, SPEC_V2.hash: 2}
    assert not await school.bandit.maintenance.pool(), "the champion has no use for it"


async def test_upkeep_counts_and_goes_on_when_the_database_does_not_answer(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enroll(school, 4)
    real, failures = SqliteStates.grow, iter([StoreUnavailable("locked"), ValueError("a defect")])

    async def grow(book: SqliteStates, limit: int, now_ms: int) -> int:
        for failure in failures:
            raise failure
        return await real(book, limit, now_ms)

    monkeypatch.setattr(SqliteStates, "grow", grow)
    task = asyncio.create_task(repeat("maintenance", school.bandit.maintenance.once, 0.0))
    sample = school.metrics.collectors.get_sample_value
    await eventually(lambda: sample("profiles_prior_version") == 1)
    assert (sample("profiles_learned_states"), sample("profiles_states_to_grow")) == (4, 0)
    await learn_one(school)
    school.clock.advance(int(POOL_EVERY_S * 1000))
    await eventually(lambda: sample("profiles_prior_version") == 2)
    task.cancel()
