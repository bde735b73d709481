"""The roll-out: which decisions are evaluated, in bounded pages, and moves that compare and set."""

from typing import Any

import msgspec
import numpy as np
import pytest

from app.bandit.model.inputs import SPEC_V2
from app.bandit.ports import Counts, RolloutLook
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums
from app.bandit.rollout.stages import RolloutState, Target
from app.bandit.rollout.verdict import Verdict
from app.stores.sql import rollout as module
from app.stores.sql.database import Database
from app.stores.sql.rollout import (
    NEWEST,
    SqlRollout,
)
from tests.support.clock import NOW_MS
from tests.support.decisions import HOUR_MS, rows_of, some, write

pytestmark = pytest.mark.both_engines

LONG_AGO = NOW_MS - 72 * HOUR_MS


@pytest.fixture
def rollout(database: Database) -> SqlRollout:
    return SqlRollout(database, SPEC_V2.hash)


def look(number: int) -> RolloutLook:
    sums = DecisionSums()
    sums.add(some(1_000))
    estimates = sums.estimates(0.1, np.random.default_rng(1), replicates=50)
    return RolloutLook(number, NOW_MS, 0.1, "shadow", estimates, Verdict("hold", "Wait."))


async def all_of(rollout: SqlRollout, state: RolloutState, until: int = NEWEST) -> list[DecisionPage]:
    return [page async for page in rollout.pages(state, until)]


async def test_rollout_begins_in_the_shadow_without_decisions(rollout: SqlRollout) -> None:
    state = await rollout.state()
    assert (state.stage, state.share, state.evaluated_after) == ("shadow", 0.0, 0)
    assert await rollout.counts(state, LONG_AGO) == Counts(NEWEST, 0, 0, 0, 0, 0)
    assert await all_of(rollout, state) == []
    assert len((await rollout.shown(state, 10))[0].users) == 0
    assert len((await rollout.recent(0, 10)).elapsed_ms) == 0


async def test_pages_contain_all_decisions_in_order(
    rollout: SqlRollout, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = some(250, share=0.25)
    await write(database, rows_of(page))
    monkeypatch.setattr(module, "PAGE", 100)
    state = await rollout.state()
    pages = await all_of(rollout, state)
    assert [len(item.users) for item in pages] == [100, 100, 50]
    assert [user for item in pages for user in item.users] == page.users
    for name in DecisionPage._fields[1:10]:
        if name != "dismissed":
            together = np.concatenate([getattr(item, name) for item in pages])
            assert np.array_equal(together, getattr(page, name)), name
    dismissed = np.concatenate([item.dismissed for item in pages])
    assert np.array_equal(dismissed, page.dismissed)
    assert sorted((await rollout.shown(state, 7))[0].users) == sorted(page.users[-7:])


async def test_shown_decisions_without_feedback_count_as_not_dismissed(rollout: SqlRollout, database: Database) -> None:
    settled, waiting = some(20), some(5)
    await write(database, rows_of(settled))
    unanswered: dict[str, Any] = {"reward": None, "reward_source": None, "action": None}
    await write(database, rows_of(waiting, state="served", **unanswered))
    left_out: list[dict[str, Any]] = [{"state": "open"}, {"state": "expired"}, {"state": "served", "explore": 0}]
    for excluded in left_out:
        await write(database, rows_of(some(3), **unanswered, **excluded))
    shown, _ = await rollout.shown(await rollout.state(), 31)  # nine of them were not shown
    assert sorted(shown.users) == sorted([*waiting.users, *settled.users[-17:]])
    assert shown.dismissed.sum() == settled.dismissed[-17:].sum()
    assert shown.rewards.sum() == settled.rewards[-17:].sum()


async def test_shown_decisions_of_the_stage_have_the_policy_that_served(
    rollout: SqlRollout, database: Database
) -> None:
    for role, made_ms in (("champion", NOW_MS - 1), ("champion", NOW_MS), ("challenger", NOW_MS)):
        await write(database, rows_of(some(2), made_ms=made_ms, every_ms=0, role=role))
    _, arms = await rollout.shown((await rollout.state())._replace(changed_at_ms=NOW_MS), 10)
    assert np.isnan(arms).sum() == 2
    assert sorted(arms[np.isfinite(arms)].tolist()) == [0, 0, 1, 1]


async def test_only_settled_exploring_decisions_with_a_shadow_are_evaluated(
    rollout: SqlRollout, database: Database
) -> None:
    row = rows_of(some(1))[0]
    await write(
        database,
        [
            row,
            {**row, "explore": 0},
            {**row, "state": "expired", "reward": None},
            {**row, "champion_p": None, "challenger_p": None, "agree": None},
            {**row, "role": "challenger"},
        ],
    )
    state = await rollout.state()
    assert await rollout.counts(state, LONG_AGO) == Counts(NEWEST, 2, 0, 1, 1)
    (page,) = await all_of(rollout, state)
    assert len(page.users) == 2
    assert (page.pi_b == [row["champion_p"], row["challenger_p"]]).all()


async def test_decisions_without_a_pooled_prior_are_not_evaluated(rollout: SqlRollout, database: Database) -> None:
    rows = rows_of(some(6))
    await write(database, [{**row, "prior_version": 0 if place < 2 else 1} for place, row in enumerate(rows)])
    (page,) = await all_of(rollout, await rollout.state())
    assert page.users == some(6).users[2:]


async def test_no_decision_counts_before_the_first_pooled_prior(rollout: SqlRollout, database: Database) -> None:
    """Otherwise the number would fall to 0 when the prior is pooled and the evaluation begins."""
    rows = rows_of(some(6), prior_version=0, made_ms=NOW_MS - 10 * HOUR_MS)
    rows[4] = {**rows[4], "state": "open", "reward": None}
    await write(database, rows)
    assert (await rollout.counts(await rollout.state(), LONG_AGO))[1:] == (0, 0, 0, 0, 5)


async def test_pages_contain_the_shadow_of_the_pool(rollout: SqlRollout, database: Database) -> None:
    await write(database, rows_of(some(3)))
    await database.execute("INSERT INTO pool_shadows (number, pool_p, v_pool) VALUES (2, 0.25, 0.5)")
    (page,) = await all_of(rollout, await rollout.state())
    assert np.array_equal(page.pi_pool, [np.nan, 0.25, np.nan], equal_nan=True)
    assert np.array_equal(page.v_pool, [np.nan, 0.5, np.nan], equal_nan=True)


@pytest.mark.parametrize("unsettled", ["open", "served"])
async def test_decisions_after_the_oldest_unsettled_one_wait(
    rollout: SqlRollout, database: Database, unsettled: str
) -> None:
    rows = rows_of(some(6), made_ms=NOW_MS - 10 * HOUR_MS)
    rows[2] = {**rows[2], "state": unsettled, "reward": None}
    rows[4] = {**rows[4], "state": "open", "reward": None}
    await write(database, rows)
    state = await rollout.state()
    counts = await rollout.counts(state, LONG_AGO)
    assert counts == Counts(3, 2, 2, 0, 0)
    (page,) = await all_of(rollout, state, counts.until)
    assert len(page.users) == 2
    # Decisions that stay unsettled for days hold up nothing.
    assert (await rollout.counts(state, NOW_MS))[1:3] == (4, 0)


async def test_move_is_refused_when_the_state_changed(rollout: SqlRollout) -> None:
    seen = await rollout.state()
    moved = await rollout.move(seen, Target("ramp", 0.05), "it is good", "ann", NOW_MS)
    assert (
        moved == RolloutState("ramp", 0.05, "it is good", "ann", NOW_MS, 0, "1", SPEC_V2.hash) == await rollout.state()
    )
    assert await rollout.move(seen, Target("rolled back", 0.0), "no", "bob", NOW_MS) is None
    assert await rollout.state() == moved


async def test_restart_excludes_earlier_looks_and_decisions(rollout: SqlRollout, database: Database) -> None:
    await write(database, rows_of(some(5)))
    first = await rollout.state()
    assert await rollout.add_look(look(1), first)
    back = await rollout.move(first, Target("rolled back", 0.0), "no", "ann", NOW_MS)
    assert back is not None
    assert len(await rollout.looks()) == 1
    anew = await rollout.move(back, Target("shadow", 0.0, anew=True), "again", "ann", NOW_MS + 1)
    assert anew is not None
    assert (anew.evaluated_after, anew.salt) == (5, str(NOW_MS + 1))
    assert await rollout.looks() == []
    assert not await rollout.add_look(look(1), first)  # by a worker that read the earlier state
    await write(database, rows_of(some(3)))
    assert (await rollout.counts(anew, LONG_AGO)).evaluated == 3


async def test_served_is_counted_since_the_stage_began(rollout: SqlRollout, database: Database) -> None:
    await write(database, rows_of(some(4), made_ms=NOW_MS - 5, role="challenger"))
    await write(database, rows_of(some(3), made_ms=NOW_MS, role="challenger"))
    await write(database, rows_of(some(2), made_ms=NOW_MS, role="champion"))
    state = (await rollout.state())._replace(changed_at_ms=NOW_MS)
    assert (await rollout.counts(state, LONG_AGO)).served == 3


async def test_looks_are_stored_once_unless_they_are_unreadable(rollout: SqlRollout, database: Database) -> None:
    state, first = await rollout.state(), look(1)
    assert await rollout.add_look(first, state)
    assert not await rollout.add_look(msgspec.structs.replace(look(1), stage="25%"), state)
    assert await rollout.add_look(look(2), state)
    assert [item.number for item in await rollout.looks()] == [1, 2]
    assert (await rollout.looks())[0] == first
    await database.execute("UPDATE rollout_looks SET body = '{\"n\": 1}' WHERE number = 2")
    assert await rollout.looks() == [first]
    assert await rollout.add_look(look(2), state)
    assert [item.number for item in await rollout.looks()] == [1, 2]
    assert not await rollout.add_look(look(2), state)


async def test_recent_decisions_are_the_newest_first(rollout: SqlRollout, database: Database) -> None:
    rows = rows_of(some(4), made_ms=NOW_MS - 3_000, every_ms=1_000)
    rows[3] = {**rows[3], "state": "open", "elapsed_us": 7_500, "profile_present": 0, "role": "challenger"}
    await write(database, rows)
    found = await rollout.recent(NOW_MS - 1_500, 10)
    assert found.elapsed_ms.tolist() == [7.5, 4.0]
    assert found.without_profile.tolist() == [1.0, 0.0]
    assert found.by_challenger.tolist() == [1.0, 0.0]
    assert found.made_ms.tolist() == [NOW_MS, NOW_MS - 1_000]
    assert len((await rollout.recent(0, 3)).elapsed_ms) == 3
