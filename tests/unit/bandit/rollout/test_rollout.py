"""The roll-out on a real database: looks when they are due, moves allowed by verdicts, and automatic rollback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from app.bandit.model.inputs import SPEC_V1, SPEC_V2
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics
from app.bandit.ports import RecentDecisions, RolloutLook
from app.bandit.rollout.aggregates import DecisionPage
from app.bandit.rollout.controller import FEWEST_ANSWERS, FEWEST_RECENT
from app.bandit.rollout.stages import Move, RolloutState, Stage, Target
from app.bandit.rollout.status import RolloutStatus
from app.errors import Conflict, StoreUnavailable
from app.settings import Settings
from app.stores.sql.access import SqlAuditTrail
from app.stores.sql.database import Database
from app.stores.sql.rollout import SqlRollout
from app.stores.sql.sufficient_statistics import SqlStates
from tests.support.audit import newest_entries
from tests.support.bandit_process import inject_failures, rollout_of
from tests.support.clock import NOW_MS, FakeClock
from tests.support.decisions import HOUR_MS, rows_of, some, write
from tests.support.logs import Recorder

pytestmark = pytest.mark.both_engines

LATELY = NOW_MS - HOUR_MS // 2


class RolloutFixture:
    """A roll-out on a database, and a fake clock."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = FakeClock()
        self.rollout = rollout_of(Settings(), database, self.clock)
        self.states = SqlStates(database, SPEC_V2)

    async def store(self, rows: Sequence[dict[str, object]]) -> None:
        await write(self.database, rows)

    async def write(self, page: DecisionPage, **changed: Any) -> None:
        """Store the decisions of a page, with some columns changed."""
        await self.store(rows_of(page, **changed))

    async def watched(self) -> RolloutStatus:
        """The status after a call of `watch`."""
        await self.rollout.watch()
        return await self.rollout.status()

    async def pool(self) -> Prior | None:
        """Store a pooled prior, after a change of the sum over all users."""
        await self.execute(
            "INSERT INTO pooled_ranges VALUES (?, '', 0, 1, 1, 1, ?) "
            "ON CONFLICT (spec_hash, first_user) DO UPDATE SET revision = pooled_ranges.revision + 1",
            SPEC_V2.hash,
            SufficientStatistics.none(SPEC_V2).pack(),
        )
        return await self.states.pool(NOW_MS)

    async def state(self) -> RolloutState:
        return await self.rollout.repository.state()

    async def looks(self) -> list[RolloutLook]:
        return await self.rollout.repository.looks()

    async def execute(self, sql: str, *values: object) -> None:
        await self.database.write(lambda connection: connection.execute(sql, values), of=())

    async def set_share(self, share: float) -> None:
        """Put the roll-out on a stage of the ramp, 90 hours ago."""
        since_ms = NOW_MS - 90 * HOUR_MS
        await self.execute("UPDATE rollout SET stage = 'ramp', share = ?, changed_at_ms = ?", share, since_ms)

    async def audit_trail(self) -> list[tuple[str, str, str]]:
        """(actor, action, outcome), oldest first."""
        entries = await newest_entries(SqlAuditTrail(self.database), 100)
        return [(entry.actor, entry.action, entry.outcome) for entry in reversed(entries)]


@pytest.fixture
async def fixture(database: Database) -> RolloutFixture:
    return RolloutFixture(database)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("app.bandit.rollout.controller.log", recorder)
    return recorder


def why_not(found: RolloutStatus, wanted: Move) -> str | None:
    (move,) = (item for item in found.moves if item.move == wanted)
    assert move.allowed == (move.why_not is None)
    return move.why_not


def dismissing(page: DecisionPage) -> DecisionPage:
    """The page with every tip that the challenger prefers dismissed."""
    return page._replace(dismissed=(page.pi_challenger > page.pi_champion).astype(float), rewards=page.rewards * 0)


async def test_verdict_is_insufficient_data_without_decisions(fixture: RolloutFixture) -> None:
    found = await fixture.watched()
    assert (found.verdict.verdict, found.decisions.next_look_at, list(found.looks)) == ("insufficient data", 4_000, [])
    assert found.verdict.reason == "0 decisions can be evaluated; the first look is at 4,000."
    assert why_not(found, "ramp") == f"insufficient data: {found.verdict.reason}"
    assert why_not(found, "rollback") is None


@pytest.mark.slow
async def test_looks_are_made_once_when_they_are_due(fixture: RolloutFixture, logs: Recorder) -> None:
    rows = rows_of(some(16_500))
    await fixture.store(rows[:3_999])
    await fixture.rollout.watch()
    assert await fixture.looks() == []
    await fixture.store(rows[3_999:4_100])
    assert "The first look is due" in (await fixture.rollout.status()).verdict.reason
    await fixture.rollout.watch()
    await fixture.rollout.watch()
    (line,) = logs.of("rollout_look")
    (first,) = await fixture.looks()
    assert (first.number, first.estimates.n, first.level, first.stage) == (1, 4_100, 0.025, "shadow")
    assert (line["number"], line["verdict"]) == (1, first.verdict.word)
    # Several looks are due at once: only the last one is made.
    await fixture.store(rows[4_100:])
    await fixture.rollout.watch()
    assert [item.number for item in await fixture.looks()] == [1, 3]
    found = await fixture.rollout.status()
    assert (found.looks[-1].decisions, found.decisions.next_look_at) == (16_500, 32_000)
    assert (found.verdict.verdict, found.verdict.improved) == ("promote", True)


async def test_no_look_is_made_when_no_decision_had_a_pooled_prior(fixture: RolloutFixture) -> None:
    """Such a challenger is practically the champion, and would be found to be no worse."""
    await fixture.write(some(4_000, skill=0.0), prior_version=0)
    found = await fixture.watched()
    assert (list(found.looks), found.verdict.verdict) == ([], "insufficient data")
    assert (found.decisions.evaluated, found.decisions.without_prior) == (0, 4_000)
    assert "4,000 more were made before the first pooled prior, and never count." in found.verdict.reason


async def test_evaluation_begins_with_the_first_prior_and_continues_with_later_ones(fixture: RolloutFixture) -> None:
    await fixture.write(some(30), prior_version=0)
    assert (await fixture.rollout.status()).decisions.without_prior == 30
    assert await fixture.pool()
    assert (await fixture.state()).evaluated_after == 30
    assert (await fixture.rollout.status()).decisions.without_prior == 0
    await fixture.write(some(20))
    assert await fixture.pool()
    assert await fixture.states.pool(NOW_MS) is None, "no sum has changed"
    assert (await fixture.state()).evaluated_after == 30
    assert (await fixture.rollout.status()).decisions.evaluated == 20


async def test_first_prior_deletes_earlier_looks(fixture: RolloutFixture) -> None:
    """Looks of another spec, or of a release that evaluated decisions without a prior."""
    await fixture.write(some(4_000))
    await fixture.rollout.watch()
    assert len(await fixture.looks()) == 1
    assert await fixture.pool()
    assert await fixture.looks() == []


@pytest.mark.parametrize("stage", ["ramp", "promoted", "rolled back"])
async def test_first_prior_changes_nothing_outside_the_shadow(fixture: RolloutFixture, stage: str) -> None:
    await fixture.write(some(30))
    await fixture.execute("UPDATE rollout SET stage = ?", stage)
    assert await fixture.pool()
    assert (await fixture.state()).evaluated_after == 0


@pytest.mark.slow
async def test_look_has_the_same_result_in_every_worker(fixture: RolloutFixture) -> None:
    await fixture.write(some(4_000))
    state = await fixture.state()
    counts = await fixture.rollout.counts(state)
    workers = [rollout_of(Settings(), fixture.database, FakeClock()) for _ in range(2)]
    made = await asyncio.gather(*(item.look(state, counts) for item in workers))
    assert sorted(item is not None for item in made) == [False, True]
    kept = await fixture.looks()
    await fixture.execute("DELETE FROM rollout_looks")
    assert await workers[0].look(state, counts) == kept[0]


async def test_no_look_is_made_when_decisions_were_erased_meanwhile(fixture: RolloutFixture) -> None:
    await fixture.write(some(3_999))
    state = await fixture.state()
    counts = (await fixture.rollout.counts(state))._replace(evaluated=4_000)
    assert await fixture.rollout.look(state, counts) is None
    assert await fixture.looks() == []


async def test_answer_time_is_the_99th_percentile(fixture: RolloutFixture) -> None:
    rows = rows_of(some(1_000), made_ms=LATELY)
    await fixture.store([{**row, "elapsed_us": 700_000 if place < 12 else 4_000} for place, row in enumerate(rows)])
    assert (await fixture.rollout.status()).guardrails.p99_ms.value == pytest.approx(700)
    await fixture.execute("UPDATE tip_scores SET elapsed_us = 4000 WHERE number <= 4")
    assert (await fixture.rollout.status()).guardrails.p99_ms.value == pytest.approx(4)


async def test_verdict_says_how_many_decisions_wait_for_an_unsettled_one(fixture: RolloutFixture) -> None:
    rows = rows_of(some(1_500), made_ms=NOW_MS - 10 * HOUR_MS)
    rows[400] = {**rows[400], "state": "served", "reward": None}
    await fixture.store(rows)
    found = await fixture.watched()
    assert (found.decisions.evaluated, found.decisions.waiting, list(found.looks)) == (400, 1_099, [])
    assert "1,099 more are settled, and count once all decisions made before" in found.verdict.reason


@pytest.mark.slow
async def test_challenger_is_ramped_step_by_step_with_an_audit_trail(fixture: RolloutFixture) -> None:
    await fixture.write(some(4_000))
    await fixture.rollout.watch()
    shares = []
    for _ in range(3):
        shares.append((await fixture.rollout.move("ramp", "ann", "looks good")).share)
        with pytest.raises(Conflict, match="0 are settled; 200 are needed"):
            await fixture.rollout.move("ramp" if shares[-1] < 1 else "promote", "ann")
        fixture.clock.advance(60_000)
        served = some(int(300 / shares[-1]), share=shares[-1], seed=3)
        await fixture.write(served, made_ms=fixture.clock.now_ms() - 30_000)
    assert shares == [0.05, 0.25, 1.0]
    done = await fixture.rollout.move("promote", "ann")
    assert (done.stage, done.share, done.changed_by) == ("promoted", 1.0, "ann")
    assert "That is an improvement." in done.reason
    with pytest.raises(Conflict, match="promoted already"):
        await fixture.rollout.move("promote", "ann")
    await fixture.rollout.move("rollback", "bob", "customers complain")
    again = await fixture.rollout.move("ramp", "bob")
    assert (again.stage, again.evaluated_after) == ("shadow", 11_500)
    assert (await fixture.rollout.move("rollback", "bob")).evaluated_after == 11_500
    said = await fixture.audit_trail()
    assert [entry[:2] for entry in said] == [
        *[("ann", "ramp roll-out")] * 5,
        *[("ann", "promote challenger")] * 3,
        ("bob", "roll back roll-out"),
        ("bob", "ramp roll-out"),
        ("bob", "roll back roll-out"),
    ]
    assert said[0][2] == "done: shadow to 5%: looks good"
    assert said[1][2].startswith("refused: of the decisions that the challenger served at 5%, 0 are settled")
    assert said[-3][2] == "done: promoted to rolled back: customers complain"
    assert said[-2][2] == "done: rolled back to shadow: the shadow begins anew"


async def test_one_of_two_concurrent_moves_is_refused(fixture: RolloutFixture) -> None:
    moves = (fixture.rollout.move("rollback", "ann"), fixture.rollout.move("rollback", "bob"))
    found = await asyncio.gather(*moves, return_exceptions=True)
    (error,) = [item for item in found if isinstance(item, Conflict)]
    assert "changed meanwhile" in str(error) or "already" in str(error)
    assert (await fixture.state()).stage == "rolled back"
    assert sorted(entry[2].partition(":")[0] for entry in await fixture.audit_trail()) == ["done", "refused"]


async def test_rollback_needs_no_figures(fixture: RolloutFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("shown", "recent"):
        inject_failures(monkeypatch, SqlRollout, method, [StoreUnavailable("no figures now")])
    assert (await fixture.rollout.move("rollback", "ann", "now")).stage == "rolled back"


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"elapsed_us": 250_000}, "One answer in a hundred takes over 250 ms"),
        ({"profile_present": 0}, "100.0% of the decisions were made without a profile"),
    ],
)
async def test_broken_guardrail_rolls_back_automatically(
    fixture: RolloutFixture, logs: Recorder, column: dict[str, object], reason: str
) -> None:
    fewest = FEWEST_ANSWERS if "elapsed_us" in column else FEWEST_RECENT
    rows = [{**row, **column} for row in rows_of(some(fewest, share=1.0), made_ms=LATELY)]
    await fixture.store(rows[:-1])
    await fixture.set_share(0.25)
    await fixture.rollout.watch()
    assert (await fixture.state()).share == 0.25, "one decision too few"
    await fixture.store(rows[-1:])
    await fixture.rollout.watch()
    await fixture.rollout.watch()
    state = await fixture.state()
    assert (state.stage, state.share, state.changed_by) == ("rolled back", 0.0, "the worker")
    assert reason in state.reason
    (line,) = logs.of("rolled_back")
    assert (line["level"], line["share"]) == ("warning", 0.25)
    ((actor, action, outcome),) = await fixture.audit_trail()
    assert (actor, action) == ("the worker", "roll back roll-out")
    assert outcome.startswith(f"done: 25% to rolled back: {reason}")


class InterruptedRollout(SqlRollout):
    """Awaits `then` after a measurement."""

    then: Callable[[], Awaitable[object]]

    async def recent(self, since_ms: int, limit: int) -> RecentDecisions:
        found = await super().recent(since_ms, limit)
        await self.then()
        return found


async def test_automatic_rollback_is_refused_when_an_admin_has_begun_anew_meanwhile(
    fixture: RolloutFixture, logs: Recorder
) -> None:
    await fixture.write(some(FEWEST_RECENT, share=1.0), made_ms=LATELY, profile_present=0)
    await fixture.set_share(0.25)
    worker = rollout_of(Settings(), fixture.database, fixture.clock)
    worker.repository = repository = InterruptedRollout(fixture.database, SPEC_V2.hash)

    async def begin_anew() -> None:
        await fixture.rollout.move("rollback", "ann")
        fixture.clock.advance(1)
        await fixture.rollout.move("ramp", "ann")

    repository.then = begin_anew
    await worker.watch()
    assert (await fixture.state())[:4] == ("shadow", 0.0, "the shadow begins anew", "ann")
    assert logs.of("rollout_changed_meanwhile")
    assert not logs.of("rolled_back")


async def test_challenger_is_rolled_back_when_its_tips_are_dismissed(fixture: RolloutFixture) -> None:
    await fixture.write(dismissing(some(3_000, share=0.25)))
    await fixture.set_share(0.25)
    await fixture.rollout.watch()
    state = await fixture.state()
    assert state.stage == "rolled back"
    assert "The challenger's tips are dismissed more often" in state.reason


async def test_dismissals_count_although_an_older_decision_is_not_settled(fixture: RolloutFixture) -> None:
    """Otherwise the harm would show only after the reward window of the older decision."""
    (first, *rows) = rows_of(dismissing(some(3_000, share=0.25)), made_ms=NOW_MS - HOUR_MS)
    await fixture.store([{**first, "state": "served", "reward": None, "action": None}, *rows])
    await fixture.set_share(0.25)
    assert (await fixture.rollout.status()).decisions.evaluated == 0
    await fixture.rollout.watch()
    assert (await fixture.state()).stage == "rolled back"


async def test_broken_guardrail_is_only_reported_in_the_shadow_and_after_promotion(fixture: RolloutFixture) -> None:
    await fixture.write(dismissing(some(3_000)))
    found = await fixture.watched()
    assert (found.stage, found.verdict.verdict) == ("shadow", "roll back")
    assert (why_not(found, "ramp") or "").startswith("roll back: The challenger's tips are dismissed")
    await fixture.execute("UPDATE rollout SET stage = 'promoted', share = 1")
    await fixture.rollout.watch()
    assert (await fixture.state()).stage == "promoted"


@pytest.mark.slow
async def test_slow_answers_break_no_guardrail_in_the_shadow(fixture: RolloutFixture) -> None:
    """All answers are the champion's; the challenger is computed after the answer."""
    await fixture.write(some(4_000))
    await fixture.write(some(FEWEST_ANSWERS, seed=2), made_ms=LATELY, elapsed_us=900_000)
    found = await fixture.watched()
    assert found.guardrails.p99_ms.value == pytest.approx(900), "it is shown all the same"
    assert found.guardrails.broken == []
    assert (found.verdict.verdict, found.looks[-1].verdict.verdict) == ("promote", "promote")
    assert why_not(found, "ramp") is None


@pytest.mark.parametrize(
    ("champion_ms", "challenger_ms", "stage"), [(900, 1, "ramp"), (700, 900, "ramp"), (4, 900, "rolled back")]
)
async def test_slow_challenger_is_rolled_back_only_when_the_champion_is_faster(
    fixture: RolloutFixture, champion_ms: int, challenger_ms: int, stage: str
) -> None:
    await fixture.write(some(FEWEST_ANSWERS), made_ms=LATELY, elapsed_us=champion_ms * 1_000, role="champion")
    page = some(FEWEST_ANSWERS)
    await fixture.write(page, made_ms=LATELY + 1_000, elapsed_us=challenger_ms * 1_000, role="challenger")
    await fixture.set_share(0.05)
    await fixture.rollout.watch()
    assert (await fixture.state()).stage == stage
    if stage == "ramp":
        assert (await fixture.rollout.status()).guardrails.p99_ms.value == pytest.approx(challenger_ms)


@pytest.mark.slow
async def test_wrong_propensities_hold_the_roll_out(fixture: RolloutFixture) -> None:
    page = some(4_000)
    wrong = page._replace(pi_challenger=page.pi_challenger * 1.3)
    await fixture.write(wrong)
    found = await fixture.watched()
    assert found.verdict.verdict == "hold"
    with pytest.raises(Conflict, match="not credible"):
        await fixture.rollout.move("ramp", "ann")


async def test_ramp_is_refused_without_a_challenger(fixture: RolloutFixture) -> None:
    alone = rollout_of(Settings(shadow=False), fixture.database, fixture.clock)
    assert "PROFILES_SHADOW" in (why_not(await alone.status(), "ramp") or "")


@pytest.mark.slow
async def test_alarm_is_raised_only_with_a_challenger(fixture: RolloutFixture) -> None:
    await fixture.write(some(4_000, skill=-1.5))
    await fixture.set_share(0.25)
    await fixture.rollout.watch()
    alarm = await fixture.rollout.alarm()
    assert alarm is not None
    assert alarm[0].startswith("The challenger serves 25% of the users. Over 4,000 decisions")
    alone = rollout_of(Settings(shadow=False), fixture.database, fixture.clock)
    assert await alone.alarm() is None


@pytest.mark.slow
async def test_alarm_ignores_a_guardrail_broken_at_the_time_of_the_look(fixture: RolloutFixture) -> None:
    await fixture.write(some(4_000))
    await fixture.write(some(FEWEST_RECENT, seed=2), made_ms=LATELY, profile_present=0)
    await fixture.rollout.watch()
    assert (await fixture.rollout.status()).verdict.verdict == "roll back"
    fixture.clock.advance(2 * HOUR_MS)
    await fixture.rollout.move("ramp", "ann")
    assert await fixture.rollout.alarm() is None


async def test_broken_guardrail_raises_an_alarm_after_promotion(
    fixture: RolloutFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = fixture.rollout.repository.recent

    async def recent(since_ms: int, limit: int) -> RecentDecisions:
        asked.append(since_ms)
        return await real(since_ms, limit)

    monkeypatch.setattr(fixture.rollout.repository, "recent", recent)
    await fixture.write(some(FEWEST_ANSWERS, share=1.0), made_ms=LATELY, elapsed_us=900_000, role="challenger")
    await fixture.set_share(1.0)
    await fixture.execute("UPDATE rollout SET stage = 'promoted'")
    alarm = await fixture.rollout.alarm()
    assert alarm is not None
    assert alarm[0] == (
        "The challenger is promoted, and a guardrail is broken. "
        "One answer in a hundred takes over 900 ms; 100 ms is allowed. "
        "At least 98.6% of the challenger's answers take longer."
    )
    assert "roll back" in alarm[1]
    assert await fixture.rollout.alarm() == alarm
    assert len(asked) == 1, "the second alarm uses the cached guardrails"
    fixture.clock.advance(24 * HOUR_MS)
    assert await fixture.rollout.alarm() is None
    assert len(asked) == 2


@pytest.mark.slow
async def test_roll_out_begun_by_an_earlier_release_uses_no_level_twice(fixture: RolloutFixture) -> None:
    """Its first three looks were at 1,000, 2,000 and 4,000 decisions."""
    rows = rows_of(some(8_000))
    await fixture.store(rows[:4_000])
    await fixture.rollout.watch()
    await fixture.execute("UPDATE rollout_looks SET number = 3, body = replace(body, '\"number\":1', '\"number\":3')")
    assert (await fixture.rollout.status()).decisions.next_look_at == 8_000
    await fixture.store(rows[4_000:])
    await fixture.rollout.watch()
    assert [(look.number, look.level) for look in await fixture.looks()] == [(3, 0.025), (4, 0.0025)]


async def test_equally_slow_policies_break_no_guardrail(fixture: RolloutFixture) -> None:
    """The 99th percentile of the challenger's answers is above 1.5 times the champion's, by chance."""
    for role, slow in (("champion", 9), ("challenger", 20)):
        rows = rows_of(some(FEWEST_ANSWERS), made_ms=LATELY, role=role)
        await fixture.store(
            [{**row, "elapsed_us": 700_000 if place < slow else 4_000} for place, row in enumerate(rows)]
        )
    await fixture.set_share(0.05)
    await fixture.rollout.watch()
    rails = (await fixture.rollout.status()).guardrails
    assert rails.p99_ms.value == pytest.approx(700)
    assert rails.p99_ms.limit == 100
    assert 0.002 < (rails.slow_answers.value or 0) < 0.01
    assert (await fixture.state()).stage == "ramp"


async def test_slow_answers_of_an_earlier_trial_do_not_count(fixture: RolloutFixture) -> None:
    await fixture.write(some(FEWEST_ANSWERS), made_ms=LATELY, elapsed_us=900_000, role="challenger")
    await fixture.set_share(0.05)
    await fixture.execute("UPDATE rollout SET changed_at_ms = ?", NOW_MS - 1)
    await fixture.rollout.watch()
    assert (await fixture.state()).stage == "ramp"


@pytest.mark.slow
async def test_rewards_of_the_users_of_each_policy_are_compared(fixture: RolloutFixture) -> None:
    page = some(12_000, users=1_200, share=0.25)
    served = (page.pi_b == page.pi_challenger).astype(float)
    await fixture.write(page._replace(rewards=page.rewards * (1 - served)), made_ms=LATELY)
    await fixture.set_share(0.25)
    found = (await fixture.rollout.status()).experiment
    assert found is not None
    assert (found.champion.users, found.challenger.users, found.share) == (900, 300, 0.25)
    assert found.p == pytest.approx(1)
    assert found.champion.reward is not None
    assert found.challenger.reward is not None
    assert found.champion.reward.low < page.rewards[served == 0].mean() < found.champion.reward.high
    assert found.challenger.reward.value == 0
    await fixture.rollout.watch()
    state = await fixture.state()
    assert state.stage == "rolled back"
    assert "The challenger's users earn -0." in state.reason


async def test_only_decisions_of_the_stage_belong_to_the_experiment(fixture: RolloutFixture) -> None:
    await fixture.write(some(1_000, users=150))
    await fixture.write(some(500, users=150, share=0.25, seed=2), made_ms=LATELY)
    await fixture.set_share(0.25)
    found = (await fixture.rollout.status()).experiment
    assert found is not None
    assert found.champion.decisions + found.challenger.decisions == 500
    assert found.lift is None, "the challenger has too few users"
    await fixture.execute("UPDATE rollout SET share = 1")
    assert (await fixture.rollout.status()).experiment is None


@pytest.mark.slow
async def test_ramp_is_refused_when_the_challenger_serves_a_wrong_share(fixture: RolloutFixture) -> None:
    await fixture.write(some(4_000))
    await fixture.rollout.watch()
    await fixture.set_share(0.05)
    await fixture.write(some(4_000, share=0.25, seed=2), made_ms=LATELY)
    found = await fixture.rollout.status()
    assert found.experiment is not None
    assert found.experiment.p < 1e-9
    assert found.verdict.verdict == "hold"
    assert "The challenger serves 25.0% of the users with recent decisions instead of 5%" in found.verdict.reason
    with pytest.raises(Conflict, match="instead of 5%"):
        await fixture.rollout.move("ramp", "ann")


async def test_another_trial_has_another_salt(fixture: RolloutFixture) -> None:
    assert (await fixture.state()).salt == "1"
    for move, salt in (("rollback", "1"), ("ramp", str(NOW_MS)), ("rollback", str(NOW_MS))):
        assert (await fixture.rollout.move(move, "ann")).salt == salt  # type: ignore[arg-type]  # a move


UNKNOWN = "f" * 64


async def reached_by(fixture: RolloutFixture, challenger: str, stage: Stage, share: float) -> None:
    """Let a release with this challenger have reached a stage."""
    repository = SqlRollout(fixture.database, challenger)
    target = Target(stage, share)
    assert await repository.move(await repository.state(), target, "it is good", "ann", NOW_MS - HOUR_MS) is not None


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("ramp", 0.5),
        pytest.param("shadow", 0.0, marks=pytest.mark.slow),
        pytest.param("promoted", 1.0, marks=pytest.mark.slow),
        pytest.param("rolled back", 0.0, marks=pytest.mark.slow),
    ],
)
async def test_other_challenger_begins_in_the_shadow(
    fixture: RolloutFixture, logs: Recorder, stage: Stage, share: float
) -> None:
    await fixture.write(some(4_000))
    await fixture.rollout.watch()
    assert len(await fixture.looks()) == 1
    await reached_by(fixture, SPEC_V1.hash, stage, share)
    found = await fixture.rollout.status()
    assert (found.stage, found.share) == ("rolled back", 0.0)
    assert SPEC_V1.hash in found.reason
    assert "another" in str(await fixture.rollout.alarm())
    await fixture.rollout.watch()
    state = await fixture.state()
    assert (state.stage, state.share, state.changed_by) == ("shadow", 0.0, "the worker")
    assert (state.evaluated_after, state.salt, state.challenger) == (4_000, str(NOW_MS), SPEC_V2.hash)
    assert await fixture.looks() == []
    label = "50%" if stage == "ramp" else stage
    ((actor, action, outcome),) = await fixture.audit_trail()
    assert (actor, action) == ("the worker", "begin roll-out anew")
    assert outcome.startswith(f"done: {label} to shadow: The stage {label} belongs to another")
    assert [line["before"] for line in logs.of("rollout_begins_anew")] == [label]
    await fixture.rollout.watch()
    assert len(await fixture.audit_trail()) == 1
    assert await fixture.rollout.alarm() is None


async def test_workers_begin_anew_once(fixture: RolloutFixture) -> None:
    await reached_by(fixture, SPEC_V1.hash, "ramp", 0.5)
    await asyncio.gather(*(fixture.rollout.watch() for _ in range(3)))
    assert [entry[2].partition(":")[0] for entry in await fixture.audit_trail()].count("done") == 1
    assert (await fixture.state()).stage == "shadow"


async def test_stage_of_a_later_release_is_left_to_its_workers(fixture: RolloutFixture) -> None:
    """Otherwise the workers of both releases would begin anew in turns during an upgrade."""
    await reached_by(fixture, UNKNOWN, "ramp", 0.5)
    await fixture.rollout.watch()
    assert (await fixture.state()).stage == "ramp"
    assert "ramp to start anew" in str(await fixture.rollout.alarm())
    found = await fixture.rollout.status()
    assert why_not(found, "rollback") is None, "the other release may still serve users"
    with pytest.raises(Conflict, match="ramp it first"):
        await fixture.rollout.move("promote", "ann")
    assert (await fixture.rollout.move("ramp", "ann")).stage == "shadow"
    assert (await fixture.state()).challenger == SPEC_V2.hash


async def test_stage_without_a_challenger_is_left(database: Database) -> None:
    fixture = RolloutFixture(database)
    await reached_by(fixture, SPEC_V2.hash, "ramp", 0.5)
    plain = rollout_of(Settings(shadow=False), database, fixture.clock)
    await plain.watch()
    assert (await plain.state()).stage == "ramp"
    await plain.move("rollback", "ann")
    assert (await fixture.state()).challenger == SPEC_V2.hash


async def test_first_prior_ties_the_shadow_to_the_challenger(fixture: RolloutFixture) -> None:
    assert (await fixture.state()).challenger is None
    assert await fixture.pool()
    assert (await fixture.state()).challenger == SPEC_V2.hash


@pytest.mark.slow
@pytest.mark.parametrize("challenger", [SPEC_V1.hash, UNKNOWN])
async def test_first_prior_leaves_the_evaluation_of_another_challenger(
    fixture: RolloutFixture, challenger: str
) -> None:
    """During an upgrade, a worker of each release pools priors for its own challenger."""
    await fixture.write(some(4_000))
    await fixture.rollout.watch()
    await reached_by(fixture, challenger, "shadow", 0.0)
    assert await fixture.pool()
    assert ((await fixture.state()).challenger, len(await fixture.looks())) == (challenger, 1)


async def test_rollback_of_a_later_release_is_left_to_its_workers(fixture: RolloutFixture) -> None:
    """Otherwise they would find another challenger rolled back, and begin anew."""
    await reached_by(fixture, UNKNOWN, "ramp", 0.5)
    assert (await fixture.rollout.move("rollback", "ann")).stage == "rolled back"
    assert (await fixture.state()).challenger == UNKNOWN
    assert (await fixture.rollout.move("ramp", "ann")).stage == "shadow"
    assert (await fixture.state()).challenger == SPEC_V2.hash


@pytest.mark.slow
async def test_decisions_of_another_release_are_not_evaluated(fixture: RolloutFixture) -> None:
    """Its workers compute the shadows of its decisions, by its challenger."""
    await reached_by(fixture, SPEC_V2.hash, "ramp", 0.25)
    for spec in (SPEC_V1.hash, SPEC_V2.hash):
        await fixture.write(some(4_000, share=0.25), spec_hash=spec, made_ms=LATELY)
    await fixture.rollout.watch()
    assert [look.estimates.n for look in await fixture.looks()] == [4_000]
    found = (await fixture.rollout.status()).experiment
    assert found is not None
    assert found.champion.decisions + found.challenger.decisions == 4_000
