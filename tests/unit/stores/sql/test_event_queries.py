"""One user's newest events with their processing state, and counts by day and hour."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.events.ports import ActivityCount, Admitted
from app.features.clock import DAY_MS, to_ms
from app.features.events import TipEvent, TipFeedback
from app.stores.sql.database import Database
from app.stores.sql.dead_letters import SqlDeadLetters
from app.stores.sql.event_log import SqlEventLog
from app.stores.sql.users import SELECT_NEWEST_TRACED, SqlUsers
from tests.support.clock import NOW_MS
from tests.support.database import steps, wipe
from tests.support.events import admitted, feedback, served
from tests.unit.stores.sqlite.test_source_against_reference import facts

pytestmark = pytest.mark.both_engines


@pytest.fixture
def queries(database: Database) -> SqlUsers:
    return SqlUsers(database)


async def test_newest_events_are_returned_with_their_state(
    database: Database, event_log: SqlEventLog, queries: SqlUsers
) -> None:
    early = admitted(feedback("ann", NOW_MS + 60_000, dwell_ms=3, offset_min=330))
    corrected = early._replace(occurred_at_ms=NOW_MS, claimed_at_ms=NOW_MS + 60_000)
    events = [admitted(served("ann", NOW_MS - 5)), admitted(served("bob")), corrected, admitted(feedback("ann"))]
    await event_log.append([events])
    await event_log.mark_consumed([1])
    await SqlDeadLetters(database).failed(4, "it failed", "Traceback", NOW_MS + 9, 1)
    newest = await queries.newest_events("ann", 50)
    assert [item.logged.seq for item in newest] == [4, 3, 1]
    assert [item.logged.event for item in newest] == [events[3].event, events[2].event, events[0].event]
    assert [(item.counted_at_ms, item.claimed_at_ms) for item in newest] == [
        (NOW_MS, None),
        (NOW_MS, NOW_MS + 60_000),
        (NOW_MS - 5, None),
    ]
    assert [(item.consumed, item.letter_id, item.logged.attempts) for item in newest] == [
        (True, 1, 1),
        (False, None, 0),
        (True, None, 0),
    ]
    assert [item.logged.seq for item in await queries.newest_events("ann", 2)] == [4, 3]
    assert await queries.newest_events("bea", 50) == []


async def test_newest_events_cost_the_same_when_there_are_more(database_path: Path, event_log: SqlEventLog) -> None:
    async def add(count: int) -> None:
        await event_log.append([[admitted(make("ann")) for make in makers for _ in range(count)]])

    makers: list[Callable[[str], TipEvent]] = [served, feedback]
    parameters: dict[str, object] = {"user": "ann", "limit": 10}
    with closing(sqlite3.connect(database_path)) as connection:
        await add(20)
        few = steps(connection, SELECT_NEWEST_TRACED, parameters)
        await add(2_000)
        assert steps(connection, SELECT_NEWEST_TRACED, parameters) <= few + 2


property_settings = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@property_settings
@example(stored=[admitted(served("ann", NOW_MS - 30 * DAY_MS + after)) for after in (-1, 0, 1)])
@example(stored=[admitted(feedback("ann", NOW_MS + after, offset_min=330)) for after in (-1, 0, 1)])
@given(stored=st.lists(facts(), max_size=30))
async def test_activity_counts_each_event_of_the_window(
    database: Database, event_log: SqlEventLog, queries: SqlUsers, stored: list[Admitted]
) -> None:
    await wipe(database)
    await event_log.append([stored])
    found = await queries.activity("ann", NOW_MS, 30)
    expected: Counter[tuple[int, int, str]] = Counter()
    for item in stored:
        event, at_ms = item.event, to_ms(item.event.occurred_at)
        if event.user_id == "ann" and NOW_MS - 30 * DAY_MS < at_ms <= NOW_MS:
            kind = event.action if isinstance(event, TipFeedback) else "served"
            expected[(NOW_MS - at_ms) // DAY_MS, event.occurred_at.hour, kind] += 1
    assert len(found) == len(expected)
    assert {(item.days_ago, item.local_hour, item.kind): item.events for item in found} == expected
    assert all(isinstance(item, ActivityCount) for item in found)
