"""The roll-out over a real database: looks when they are due, moves on their word, and going back by itself."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from app.bandit.model.pooled_prior import Prior
from app.bandit.model.specs import SPEC_V2
from app.bandit.rollout import controller as rollout_module
from app.bandit.rollout import monitor
from app.bandit.rollout.aggregates import Page
from app.bandit.rollout.controller import FEWEST_RECENT, Rollout
from app.bandit.rollout.monitor import RolloutWatch
from app.bandit.rollout.ports import RecentDecisions
from app.bandit.rollout.stages import Move
from app.bandit.rollout.status import RolloutStatus
from app.bootstrap import bandit
from app.errors import Conflict, StoreUnavailable
from app.settings import Settings
from app.stores.sqlite.audit_trail import SqliteAuditTrail
from app.stores.sqlite.database import Database
from app.stores.sqlite.states import SqliteStates
from tests.support.clock import NOW_MS, FakeClock
from tests.support.decisions import HOUR_MS, rows_of, some, write
from tests.support.logs import Recorder

LATELY = NOW_MS - HOUR_MS // 2


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def rollout(database: Database, clock: FakeClock) -> Rollout:
    settings = Settings()
    return bandit.rollout(settings, database, clock)


@pytest.fixture
def watch(rollout: Rollout, clock: FakeClock) -> RolloutWatch:
    return RolloutWatch(rollout, clock)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(monitor, "log", recorder)
    return recorder


async def trail(database: Database) -> list[tuple[str, str, str]]:
    """Actor, action and outcome, oldest first."""
    entries = await SqliteAuditTrail(database).newest(100)
    return [(entry.actor, entry.action, entry.outcome) for entry in reversed(entries)]


async def set_stage(database: Database, share: float, *, since_ms: int = NOW_MS - 90 * HOUR_MS) -> None:
    """As if it had been ramped a while ago."""

    def work(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE rollout SET stage = 'ramp', share = ?, changed_at_ms = ?", (share, since_ms))

    await database.write(work)


def why_not(found: RolloutStatus, wanted: Move) -> str | None:
    """Why a move is not allowed."""
    (move,) = (item for item in found.moves if item.move == wanted)
    assert move.allowed == (move.why_not is None)
    return move.why_not


def dismissing(page: Page) -> Page:
    """What the challenger likes is dismissed."""
    return page._replace(dismissed=(page.pi_challenger > page.pi_champion).astype(float), rewards=page.rewards * 0)


async def test_nothing_is_known_when_there_are_no_decisions(rollout: Rollout, watch: RolloutWatch) -> None:
    await watch.once()
    found = await rollout.status()
    assert (found.verdict.verdict, found.decisions.next_look_at, list(found.looks)) == ("insufficient data", 1_000, [])
    assert found.verdict.reason == "0 decisions can be evaluated; the first look is at 1,000."
    assert why_not(found, "ramp") == f"insufficient data: {found.verdict.reason}"
    assert why_not(found, "rollback") is None


async def test_looks_are_made_when_they_are_due_and_once(
    rollout: Rollout, watch: RolloutWatch, database: Database, logs: Recorder
) -> None:
    rows = rows_of(some(4_500))
    await write(database, rows[:999])
    await watch.once()
    assert await rollout.book.looks() == []
    await write(database, rows[999:1_100])
    assert "The first look is due" in (await rollout.status()).verdict.reason
    await watch.once()
    await watch.once()
    (told,) = logs.of("rollout_look")
    (first,) = await rollout.book.looks()
    assert (first.number, first.estimates.n, first.level, first.words) == (1, 1_100, 0.025, "shadow")
    assert (told["number"], told["verdict"]) == (1, first.verdict.word)
    # Many came at once: the looks in between are left out.
    await write(database, rows[1_100:])
    await watch.once()
    assert [item.number for item in await rollout.book.looks()] == [1, 3]
    found = await rollout.status()
    assert (found.looks[-1].decisions, found.decisions.next_look_at) == (4_500, 8_000)
    assert (found.verdict.verdict, found.verdict.improved) == ("promote", True)


async def test_no_look_is_made_when_everything_was_decided_without_a_pooled_prior(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    """The challenger is all but the champion then, and would be found to be no worse."""
    await write(database, rows_of(some(4_000, skill=0.0), prior_version=0))
    await watch.once()
    found = await rollout.status()
    assert (list(found.looks), found.verdict.verdict) == ([], "insufficient data")
    assert "a prior has been pooled" in found.verdict.reason


async def test_evidence_begins_with_the_first_prior_and_goes_on_with_those_that_follow(
    rollout: Rollout, database: Database
) -> None:
    states = SqliteStates(database, SPEC_V2)
    first = Prior.none(SPEC_V2)
    await write(database, rows_of(some(30), prior_version=0))
    assert await states.add_prior(first, 1)
    assert (await rollout.book.state()).evaluated_after == 30
    await write(database, rows_of(some(20)))
    assert await states.add_prior(first, 2)
    assert not await states.add_prior(first, 2)
    assert (await rollout.book.state()).evaluated_after == 30
    assert (await rollout.status()).decisions.evaluated == 20


async def test_first_prior_forgets_looks_at_a_challenger_that_knew_none(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    """Of another spec, or of a release that counted what was decided without one."""
    await write(database, rows_of(some(1_000)))
    await watch.once()
    assert len(await rollout.book.looks()) == 1
    assert await SqliteStates(database, SPEC_V2).add_prior(Prior.none(SPEC_V2), 1)
    assert await rollout.book.looks() == []


@pytest.mark.parametrize("stage", ["ramp", "promoted", "rolled back"])
async def test_first_prior_moves_nothing_when_the_roll_out_has_left_the_shadow(
    rollout: Rollout, database: Database, stage: str
) -> None:
    await write(database, rows_of(some(30)))
    await database.write(lambda c: c.execute("UPDATE rollout SET stage = ?", (stage,)))
    assert await SqliteStates(database, SPEC_V2).add_prior(Prior.none(SPEC_V2), 1)
    assert (await rollout.book.state()).evaluated_after == 0


async def test_the_same_look_is_the_same_whoever_makes_it(rollout: Rollout, database: Database) -> None:
    await write(database, rows_of(some(1_000)))
    state = await rollout.book.state()
    counts = await rollout.counts(state)
    watches = [RolloutWatch(rollout, FakeClock()) for _ in range(2)]
    made = await asyncio.gather(*(item.look(state, counts) for item in watches))
    assert sorted(item is not None for item in made) == [False, True]
    kept = await rollout.book.looks()
    await database.write(lambda connection: connection.execute("DELETE FROM rollout_looks"))
    assert await watches[0].look(state, counts) == kept[0]


async def test_no_look_is_made_when_decisions_were_erased_meanwhile(rollout: Rollout, database: Database) -> None:
    await write(database, rows_of(some(999)))
    state = await rollout.book.state()
    counts = (await rollout.counts(state))._replace(evaluated=1_000)
    assert await RolloutWatch(rollout, FakeClock()).look(state, counts) is None
    assert await rollout.book.looks() == []


async def test_time_that_counts_is_that_of_the_slowest_in_a_hundred(rollout: Rollout, database: Database) -> None:
    rows = rows_of(some(1_000), made_ms=LATELY)
    await write(database, [{**row, "elapsed_us": 700_000 if place < 12 else 4_000} for place, row in enumerate(rows)])
    assert (await rollout.status()).guardrails.p99_ms.value == pytest.approx(700)
    await database.write(lambda c: c.execute("UPDATE tip_scores SET elapsed_us = 4000 WHERE number <= 4"))
    assert (await rollout.status()).guardrails.p99_ms.value == pytest.approx(4)


async def test_reader_is_told_what_waits_when_older_decisions_are_unsettled(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    rows = rows_of(some(1_500), made_ms=NOW_MS - 10 * HOUR_MS)
    rows[400] = {**rows[400], "state": "served", "reward": None}
    await write(database, rows)
    await watch.once()
    found = await rollout.status()
    assert (found.decisions.evaluated, found.decisions.waiting, list(found.looks)) == (400, 1_099, [])
    assert "1,099 more are settled, and count once all that were made before" in found.verdict.reason


async def test_challenger_goes_from_the_shadow_to_everybody_step_by_step_audited(
    rollout: Rollout, watch: RolloutWatch, database: Database, clock: FakeClock
) -> None:
    page = some(4_000)
    await write(database, rows_of(page))
    await watch.once()
    shares = []
    for _ in range(3):
        shares.append((await rollout.move("ramp", "ann", "looks good")).share)
        with pytest.raises(Conflict, match="0 are settled; 200 are needed"):
            await rollout.move("ramp" if shares[-1] < 1 else "promote", "ann")
        clock.advance(60_000)
        settled = rows_of(some(300, share=1.0, seed=3), made_ms=clock.now_ms() - 30_000)
        await write(database, settled)
    assert shares == [0.05, 0.25, 1.0]
    done = await rollout.move("promote", "ann")
    assert (done.stage, done.share, done.changed_by) == ("promoted", 1.0, "ann")
    assert "That is an improvement." in done.reason
    with pytest.raises(Conflict, match="promoted already"):
        await rollout.move("promote", "ann")
    await rollout.move("rollback", "bob", "customers complain")
    again = await rollout.move("ramp", "bob")
    assert (again.stage, again.evaluated_after) == ("shadow", 4_900)
    assert (await rollout.move("rollback", "bob")).evaluated_after == 4_900
    said = await trail(database)
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


async def test_one_of_two_that_move_at_once_is_refused(rollout: Rollout, database: Database) -> None:
    moves = (rollout.move("rollback", "ann"), rollout.move("rollback", "bob"))
    found = await asyncio.gather(*moves, return_exceptions=True)
    (error,) = [item for item in found if isinstance(item, Conflict)]
    assert "changed meanwhile" in str(error) or "already" in str(error)
    assert (await rollout.book.state()).stage == "rolled back"
    assert sorted(entry[2].partition(":")[0] for entry in await trail(database)) == ["done", "refused"]


async def test_rollback_waits_for_no_figures(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> None:
        raise StoreUnavailable("no figures now")

    monkeypatch.setattr(rollout.book, "shown", away)
    monkeypatch.setattr(rollout.book, "recent", away)
    assert (await rollout.move("rollback", "ann", "now")).stage == "rolled back"


@pytest.mark.parametrize(
    ("what", "column", "said"),
    [
        ("answers take long", {"elapsed_us": 250_000}, "One answer in a hundred takes over 250 ms"),
        ("profiles are missing", {"profile_present": 0}, "100.0% of the decisions were made without a profile"),
    ],
)
async def test_broken_guardrail_rolls_back_by_itself_and_says_so(
    rollout: Rollout,
    watch: RolloutWatch,
    database: Database,
    logs: Recorder,
    what: str,
    column: dict[str, int],
    said: str,
) -> None:
    rows = [{**row, **column} for row in rows_of(some(FEWEST_RECENT, share=1.0), made_ms=LATELY)]
    await write(database, rows[:-1])
    await set_stage(database, 0.25)
    await watch.once()
    assert (await rollout.book.state()).share == 0.25, "one too few to say"
    await write(database, rows[-1:])
    await watch.once()
    await watch.once()
    state = await rollout.book.state()
    assert (state.stage, state.share, state.changed_by) == ("rolled back", 0.0, "the worker"), what
    assert said in state.reason
    (told,) = logs.of("rolled_back")
    assert (told["level"], told["share"]) == ("warning", 0.25)
    ((actor, action, outcome),) = await trail(database)
    assert (actor, action) == ("the worker", "roll back roll-out")
    assert outcome.startswith(f"done: 25% to rolled back: {said}")


async def test_challenger_whose_tips_are_dismissed_is_rolled_back(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    await write(database, rows_of(dismissing(some(3_000, share=0.25))))
    await set_stage(database, 0.25)
    await watch.once()
    state = await rollout.book.state()
    assert state.stage == "rolled back"
    assert "The challenger's tips are dismissed more often" in state.reason


async def test_dismissals_count_at_once_when_an_older_decision_is_not_settled(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    """Otherwise the harm would show only when that one's reward window has closed."""
    (first, *rows) = rows_of(dismissing(some(3_000, share=0.25)), made_ms=NOW_MS - HOUR_MS)
    await write(database, [{**first, "state": "served", "reward": None, "action": None}, *rows])
    await set_stage(database, 0.25)
    assert (await rollout.status()).decisions.evaluated == 0
    await watch.once()
    assert (await rollout.book.state()).stage == "rolled back"


async def test_broken_guardrail_is_only_said_in_the_shadow_and_undoes_no_promotion(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    await write(database, rows_of(dismissing(some(3_000))))
    await watch.once()
    found = await rollout.status()
    assert (found.stage, found.verdict.verdict) == ("shadow", "roll back")
    assert (why_not(found, "ramp") or "").startswith("roll back: The challenger's tips are dismissed")
    await database.write(lambda c: c.execute("UPDATE rollout SET stage = 'promoted', share = 1"))
    await watch.once()
    assert (await rollout.book.state()).stage == "promoted"


async def test_slow_answers_break_nothing_when_the_challenger_serves_nobody(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    """They are the champion's; how long the challenger takes is worked out beside, after the answer."""
    await write(database, rows_of(some(4_000)))
    await write(database, rows_of(some(FEWEST_RECENT, seed=2), made_ms=LATELY, elapsed_us=900_000))
    await watch.once()
    found = await rollout.status()
    assert found.guardrails.p99_ms.value == pytest.approx(900), "it is shown all the same"
    assert found.guardrails.broken == []
    assert (found.verdict.verdict, found.looks[-1].verdict.verdict) == ("promote", "promote")
    assert why_not(found, "ramp") is None


async def test_answers_of_the_champion_do_not_count_when_the_challenger_serves(
    rollout: Rollout, watch: RolloutWatch, database: Database
) -> None:
    slow = rows_of(some(FEWEST_RECENT), made_ms=LATELY, elapsed_us=900_000, role="champion")
    quick = rows_of(some(FEWEST_RECENT), made_ms=LATELY + 1_000, elapsed_us=1_000, role="challenger")
    await write(database, [*slow, *quick])
    await set_stage(database, 0.05)
    await watch.once()
    found = await rollout.status()
    assert found.share == 0.05
    assert found.guardrails.p99_ms.value == pytest.approx(1.0)


@pytest.mark.parametrize(("champion_ms", "stage"), [(700, "ramp"), (4, "rolled back")])
async def test_machine_that_is_slow_for_everybody_rolls_nothing_back(
    rollout: Rollout, watch: RolloutWatch, database: Database, champion_ms: int, stage: str
) -> None:
    usual = rows_of(some(FEWEST_RECENT), made_ms=LATELY, elapsed_us=champion_ms * 1_000, role="champion")
    slow = rows_of(some(FEWEST_RECENT), made_ms=LATELY + 1_000, elapsed_us=900_000, role="challenger")
    await write(database, [*usual, *slow])
    await set_stage(database, 0.05)
    await watch.once()
    found = await rollout.status()
    assert found.stage == stage
    assert found.verdict.verdict == ("roll back" if stage == "rolled back" else "insufficient data")


async def test_wrong_probabilities_hold_everything(rollout: Rollout, watch: RolloutWatch, database: Database) -> None:
    page = some(2_000)
    wrong = page._replace(pi_challenger=page.pi_challenger * 1.3)
    await write(database, rows_of(wrong))
    await watch.once()
    found = await rollout.status()
    assert found.verdict.verdict == "hold"
    with pytest.raises(Conflict, match="cannot be believed"):
        await rollout.move("ramp", "ann")


async def test_without_a_challenger_nothing_can_be_ramped(database: Database, clock: FakeClock) -> None:
    rollout = bandit.rollout(Settings(shadow=False), database, clock)
    assert "PROFILES_SHADOW" in (why_not(await rollout.status(), "ramp") or "")


async def test_nobody_is_alarmed_when_there_is_no_challenger_that_could_serve(
    rollout: Rollout, watch: RolloutWatch, database: Database, clock: FakeClock
) -> None:
    await write(database, rows_of(some(4_000, skill=-1.5)))
    await set_stage(database, 0.25)
    await watch.once()
    told = await rollout.alarm()
    assert told is not None
    assert told.text.startswith("The challenger serves 25% of the users. Over 4,000 decisions")
    alone = bandit.rollout(Settings(shadow=False), database, clock)
    assert await alone.alarm() is None


async def test_alarm_is_about_the_lift_and_not_about_a_guardrail_that_was_broken_when_the_look_was_made(
    rollout: Rollout, watch: RolloutWatch, database: Database, clock: FakeClock
) -> None:
    await write(database, rows_of(some(4_000)))
    await write(database, rows_of(some(FEWEST_RECENT, seed=2), made_ms=LATELY, profile_present=0))
    await watch.once()
    assert (await rollout.status()).verdict.verdict == "roll back"
    clock.advance(2 * HOUR_MS)
    await rollout.move("ramp", "ann")
    assert await rollout.alarm() is None


async def test_broken_guardrail_alarms_when_the_challenger_is_promoted(
    rollout: Rollout, database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = rollout.book.recent

    async def recent(since_ms: int, limit: int) -> RecentDecisions:
        asked.append(since_ms)
        return await real(since_ms, limit)

    monkeypatch.setattr(rollout.book, "recent", recent)
    slow = rows_of(some(FEWEST_RECENT, share=1.0), made_ms=LATELY, elapsed_us=900_000, role="challenger")
    await write(database, slow)
    await set_stage(database, 1.0)
    await database.write(lambda c: c.execute("UPDATE rollout SET stage = 'promoted'"))
    told = await rollout.alarm()
    assert told is not None
    assert told.text == (
        "The challenger is promoted, and a guardrail is broken. "
        "One answer in a hundred takes over 900 ms; 100 ms is allowed."
    )
    assert "Nothing rolls it back by itself" in told.advice
    assert await rollout.alarm() == told
    assert len(asked) == 1, "the overview is drawn again and again"
    clock.advance(2 * HOUR_MS)
    assert await rollout.alarm() is None
    assert len(asked) == 2


def test_guardrails_are_looked_at_often_and_seldom_wrong() -> None:
    assert rollout_module.RAIL_LEVEL * rollout_module.RAIL_REPLICATES >= 1  # its tail is read off, not guessed
