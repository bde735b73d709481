"""Decisions are decoded exactly, and pruned with the rows that belong to them."""

from datetime import timedelta, timezone

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.bandit.decisions import Decision
from app.bandit.model.inputs import Context
from app.bandit.model.thompson_sampling import Ranking, Role
from app.features.clock import DAY_MS
from app.features.registry import ProfileRead, ValueRead
from app.stores.sql.database import Database
from app.stores.sql.decision_rows import decision_of, row_of
from app.stores.sql.logged_profiles import SqlLoggedProfiles
from tests.support.bandit_process import BanditProcess
from tests.support.events import feedback
from tests.support.score_requests import tip

pytestmark = pytest.mark.both_engines

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=8)
values = st.one_of(st.none(), numbers, st.integers(-(10**30), 10**30), texts)
zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
counts = st.integers(1, 5)
reads = st.builds(
    ProfileRead, st.integers(0, 2**50), st.dictionaries(texts, st.builds(ValueRead, texts, st.integers(0, 2**62)))
)


@st.composite
def any_decision(draw: st.DrawFn) -> Decision:
    count = draw(counts)
    rankings = [
        Ranking(np.array(draw(st.lists(numbers, min_size=count, max_size=count))), np.full(count, 1 / count))
        for _ in range(2)
    ]
    role: Role = draw(st.sampled_from(["champion", "challenger"]))
    return Decision(
        id=draw(texts),
        request_id=draw(st.one_of(st.none(), texts)),
        user_id=draw(texts),
        created_at_ms=draw(st.integers(0, 2**50)),
        explore=draw(st.booleans()),
        role=role,
        served_by="policy",
        policy_hash="a",
        spec_hash="b",
        state_version=draw(st.integers(0, 2**40)),
        prior_version=draw(st.integers(0, 2**40)),
        origin=draw(st.sampled_from(["request", "service", "absent"])),
        profile=draw(st.one_of(st.none(), st.dictionaries(texts, values, max_size=3))),
        profile_read=draw(st.one_of(st.none(), reads)),
        candidates=tuple(
            tip(str(number), draw(st.booleans()), abs(draw(numbers)), draw(numbers)) for number in range(count)
        ),
        context=Context(draw(st.one_of(st.none(), st.datetimes(timezones=zones)))),
        chosen=draw(st.integers(0, count - 1)),
        elapsed_us=draw(st.integers(0, 2**40)),
        theta=np.array(draw(st.lists(numbers, min_size=1, max_size=4))),
        phi=np.array(draw(st.lists(numbers, min_size=1, max_size=4))),
        ranking=rankings[0],
        shadow=rankings[1] if draw(st.booleans()) else None,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_decision())
def test_decoded_decision_equals_the_stored_one(decision: Decision) -> None:
    back = decision_of(row_of(decision))
    for name in Decision.__struct_fields__:
        one, other = getattr(decision, name), getattr(back, name)
        if isinstance(one, Ranking):
            assert other is not None
            assert all(map(np.array_equal, one, other))
        elif isinstance(one, np.ndarray):
            assert one.tobytes() == other.tobytes()
        else:
            assert one == other, name
    assert back.context.at is None or back.context.at.utcoffset() == decision.context.at.utcoffset()  # type: ignore[union-attr]


async def test_profiles_of_damaged_decisions_are_left_out(database: Database) -> None:
    process, logged = BanditProcess(database), SqlLoggedProfiles(database)
    first, damaged, last = [await process.decide() for _ in range(3)]
    await process.execute("UPDATE tip_scores SET request = '{' WHERE decision_id = ?", damaged.id)
    assert [item.decision_id for item in await logged.newest(3)] == [last.id, first.id]
    assert (await logged.by_id([first.id, damaged.id])).keys() == {first.id}


async def test_pruning_keeps_the_newest_prior_of_each_spec(database: Database) -> None:
    process = BanditProcess(database)
    await process.learn_one()
    assert await process.pool()
    await process.execute(
        "INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms) VALUES (?, ?, 1, 1, 1, ?)",
        "of the next release",
        b"",
        process.clock.now_ms(),
    )
    process.clock.advance(DAY_MS)
    assert await process.retention.prune(process.clock.now_ms(), 10) == 1
    assert await process.rows("SELECT version FROM bandit_priors ORDER BY version") == [(1,), (2,)]


async def test_pruning_deletes_old_decisions_and_the_priors_that_none_names(
    database: Database,
) -> None:
    process = BanditProcess(database)
    kept: list[Decision] = []
    for day in range(6):
        decision = await process.decide(request_id=f"request-{day}")
        await process.consume(
            feedback("ann", process.clock.now_ms(), tip_id=decision.chosen_id, decision_id=decision.id)
        )
        await process.pool()
        kept.append(decision)
        process.clock.advance(DAY_MS)
    before_ms = kept[3].created_at_ms
    prune = process.retention.prune
    assert [await prune(before_ms, 2), await prune(before_ms, 2), await prune(before_ms, 2)] == [2, 1, 0]
    assert await process.rows("SELECT decision_id FROM tip_scores ORDER BY created_at_ms") == [
        (item.id,) for item in kept[3:]
    ]
    assert await process.rows("SELECT COUNT(*) FROM decision_events") == [(3,)]
    assert [item.prior_version for item in kept] == [0, 1, 2, 3, 4, 5]
    assert await process.rows("SELECT version FROM bandit_priors ORDER BY version") == [(3,), (4,), (5,), (6,)]
    assert (await process.statistics()).decisions == 6, "pruning keeps what was learned"
    process.clock.advance(100 * DAY_MS)
    assert await prune(process.clock.now_ms(), 10) == 3
    assert await process.rows("SELECT version FROM bandit_priors ORDER BY version") == [(6,)], "the newest is in force"
