"""The roll-out in SQLite: what is evaluated and what is not, in bounded pages; changes on what was seen only."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from app.bandit.rollout.aggregates import DecisionPage, DecisionSums
from app.bandit.rollout.ports import Counts, RolloutLook
from app.bandit.rollout.stages import RolloutState, Target
from app.bandit.rollout.verdict import Verdict
from app.stores.sqlite import rollout as rollout_module
from app.stores.sqlite.database import Database
from app.stores.sqlite.rollout import (
    NEWEST,
    SqliteRollout,
)
from tests.support.clock import NOW_MS
from tests.support.decisions import HOUR_MS, rows_of, some, write

LONG_AGO = NOW_MS - 72 * HOUR_MS


@pytest.fixture
def book(database: Database) -> SqliteRollout:
    return SqliteRollout(database)


def look(number: int) -> RolloutLook:
    """A look that found something."""
    sums = DecisionSums()
    sums.add(some(1_000))
    estimates = sums.estimates(0.1, np.random.default_rng(1), replicates=50)
    return RolloutLook(number, NOW_MS, 0.1, "shadow", estimates, Verdict("hold", "Wait."))


async def all_of(book: SqliteRollout, state: RolloutState, until: int = NEWEST) -> list[DecisionPage]:
    """Every page."""
    return [page async for page in book.pages(state, until)]


async def test_rollout_begins_in_the_shadow_with_nobody(book: SqliteRollout) -> None:
    state = await book.state()
    assert (state.stage, state.share, state.evaluated_after) == ("shadow", 0.0, 0)
    assert await book.counts(state, LONG_AGO) == Counts(NEWEST, 0, 0, 0, 0)
    assert await all_of(book, state) == []
    assert len((await book.shown(state, 10)).users) == 0
    assert len((await book.recent(0, 10)).elapsed_ms) == 0


async def test_decisions_come_back_as_they_were_in_pages_in_order(
    book: SqliteRollout, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = some(250, share=0.25)
    await write(database, rows_of(page))
    monkeypatch.setattr(rollout_module, "PAGE", 100)
    state = await book.state()
    pages = await all_of(book, state)
    assert [len(item.users) for item in pages] == [100, 100, 50]
    assert [user for item in pages for user in item.users] == page.users
    for name in DecisionPage._fields[1:]:
        if name != "dismissed":
            together = np.concatenate([getattr(item, name) for item in pages])
            assert np.array_equal(together, getattr(page, name)), name
    dismissed = np.concatenate([item.dismissed for item in pages])
    assert np.array_equal(dismissed, page.dismissed)
    assert (await book.shown(state, 7)).users == page.users[:-8:-1]


async def test_what_was_shown_and_not_answered_stands_among_what_was_shown_as_not_dismissed(
    book: SqliteRollout, database: Database
) -> None:
    settled, waiting = some(20), some(5)
    await write(database, rows_of(settled))
    unanswered: dict[str, Any] = {"reward": None, "reward_source": None, "action": None}
    await write(database, rows_of(waiting, state="served", **unanswered))
    left_out: list[dict[str, Any]] = [{"state": "open"}, {"state": "expired"}, {"state": "served", "explore": 0}]
    for kept_out in left_out:
        await write(database, rows_of(some(3), **unanswered, **kept_out))
    shown = await book.shown(await book.state(), 22)
    assert shown.users == [*waiting.users[::-1], *settled.users[:-18:-1]]
    assert (shown.rewards[:5].tolist(), shown.dismissed[:5].tolist()) == ([0.0] * 5, [0.0] * 5)
    assert np.array_equal(shown.dismissed[5:], settled.dismissed[:-18:-1])


async def test_only_what_explored_is_settled_and_known_of_both_policies_is_evaluated(
    book: SqliteRollout, database: Database
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
    state = await book.state()
    assert await book.counts(state, LONG_AGO) == Counts(NEWEST, 2, 0, 1, 1)
    (page,) = await all_of(book, state)
    assert len(page.users) == 2
    assert (page.pi_b == [row["champion_p"], row["challenger_p"]]).all()


async def test_what_was_decided_without_a_pooled_prior_is_no_evidence(book: SqliteRollout, database: Database) -> None:
    """A process may have looked for a prior just before the first one was stored."""
    rows = rows_of(some(6))
    await write(database, [{**row, "prior_version": 0 if place < 2 else 1} for place, row in enumerate(rows)])
    (page,) = await all_of(book, await book.state())
    assert page.users == some(6).users[2:]


@pytest.mark.parametrize("unsettled", ["open", "served"])
async def test_what_is_newer_than_the_oldest_unsettled_waits(
    book: SqliteRollout, database: Database, unsettled: str
) -> None:
    rows = rows_of(some(6), made_ms=NOW_MS - 10 * HOUR_MS)
    rows[2] = {**rows[2], "state": unsettled, "reward": None}
    rows[4] = {**rows[4], "state": "open", "reward": None}
    await write(database, rows)
    state = await book.state()
    counts = await book.counts(state, LONG_AGO)
    assert counts == Counts(3, 2, 2, 0, 0)
    (page,) = await all_of(book, state, counts.until)
    assert len(page.users) == 2
    # What is stuck for days holds nothing up.
    assert (await book.counts(state, NOW_MS))[1:3] == (4, 0)


async def test_a_move_is_made_only_on_what_was_seen(book: SqliteRollout) -> None:
    seen = await book.state()
    moved = await book.move(seen, Target("ramp", 0.05), "it is good", "ann", NOW_MS)
    assert moved == RolloutState("ramp", 0.05, "it is good", "ann", NOW_MS, 0) == await book.state()
    assert await book.move(seen, Target("rolled back", 0.0), "no", "bob", NOW_MS) is None
    assert await book.state() == moved


async def test_begun_anew_it_forgets_looks_and_decisions_so_far(book: SqliteRollout, database: Database) -> None:
    await write(database, rows_of(some(5)))
    first = await book.state()
    assert await book.add_look(look(1), first)
    back = await book.move(first, Target("rolled back", 0.0), "no", "ann", NOW_MS)
    assert back is not None
    assert len(await book.looks()) == 1
    anew = await book.move(back, Target("shadow", 0.0, anew=True), "again", "ann", NOW_MS + 1)
    assert anew is not None
    assert anew.evaluated_after == 5
    assert await book.looks() == []
    assert not await book.add_look(look(1), first)  # by a worker that had begun it before
    await write(database, rows_of(some(3)))
    assert (await book.counts(anew, LONG_AGO)).evaluated == 3


async def test_served_counts_from_the_beginning_of_the_stage(book: SqliteRollout, database: Database) -> None:
    await write(database, rows_of(some(4), made_ms=NOW_MS - 5, role="challenger"))
    await write(database, rows_of(some(3), made_ms=NOW_MS, role="challenger"))
    await write(database, rows_of(some(2), made_ms=NOW_MS, role="champion"))
    state = (await book.state())._replace(changed_at_ms=NOW_MS)
    assert (await book.counts(state, LONG_AGO)).served == 3


async def test_looks_are_kept_once_each_and_another_releases_are_left_out(
    book: SqliteRollout, database: Database
) -> None:
    state, first = await book.state(), look(1)
    assert await book.add_look(first, state)
    assert not await book.add_look(msgspec.structs.replace(look(1), stage="25%"), state)
    assert await book.add_look(look(2), state)
    assert [item.number for item in await book.looks()] == [1, 2]
    assert (await book.looks())[0] == first
    await database.write(lambda c: c.execute("UPDATE rollout_looks SET body = '{\"n\": 1}' WHERE number = 2"))
    assert await book.looks() == [first]


async def test_look_that_this_release_cannot_read_is_made_anew_instead_of_again_and_again(
    book: SqliteRollout, database: Database
) -> None:
    state = await book.state()
    assert await book.add_look(look(1), state)
    await database.write(lambda c: c.execute("UPDATE rollout_looks SET body = '{\"n\": 1}'"))
    assert await book.looks() == []
    assert await book.add_look(look(1), state)
    assert [item.number for item in await book.looks()] == [1]
    assert not await book.add_look(look(1), state)


async def test_recent_are_the_newest_since_a_moment(book: SqliteRollout, database: Database) -> None:
    rows = rows_of(some(4), made_ms=NOW_MS - 3_000, every_ms=1_000)
    rows[3] = {**rows[3], "state": "open", "elapsed_us": 7_500, "profile_present": 0, "role": "challenger"}
    await write(database, rows)
    found = await book.recent(NOW_MS - 1_500, 10)
    assert found.elapsed_ms.tolist() == [7.5, 4.0]
    assert found.without_profile.tolist() == [1.0, 0.0]
    assert found.by_challenger.tolist() == [1.0, 0.0]
    assert len((await book.recent(0, 3)).elapsed_ms) == 3
