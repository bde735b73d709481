"""Pages of eligible users, erasure, and search by prefix."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.events.ports import Holdings
from app.profiles.ports import END_OF_TIME_MS
from app.stores.sql.database import Database
from app.stores.sql.users import SELECT_BY_PREFIX, SELECT_ELIGIBLE, SqlUsers
from tests.support.database import steps

pytestmark = pytest.mark.both_engines

VIEW = "INSERT INTO tip_views VALUES (NULL, ?, 'tip', ?, 0, ?, NULL)"
FEEDBACK = "INSERT INTO tip_feedback VALUES (NULL, ?, 'tip', ?, 0, ?, NULL, 'completed', NULL)"
SINCE_MS, PAGE = 1_000, 10


@pytest.fixture
def events(database_path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to store rows with."""
    with closing(sqlite3.connect(database_path)) as connection:
        yield connection


def store(connection: sqlite3.Connection, statement: str, users: list[str], at_ms: int = SINCE_MS) -> None:
    with connection:
        connection.executemany(statement, [(user, at_ms, at_ms) for user in users])
    log(connection, users)


def log(connection: sqlite3.Connection, users: Iterable[str]) -> None:
    rows = [(uuid.uuid4().hex, user) for user in users]
    with connection:
        connection.executemany(
            "INSERT INTO event_log (event_id, subject, user_id, digest, occurred_at_ms, received_at_ms) "
            "VALUES (?, 'signals.tip.served', ?, x'', 0, 0)",
            rows,
        )


async def test_pages_contain_every_user_once(
    database: Database, database_path: Path, events: sqlite3.Connection
) -> None:
    names = [f"user-{number:03d}" for number in range(60)]
    store(events, VIEW, names[:40])
    store(events, VIEW, names[:40])
    store(events, FEEDBACK, names[25::2])
    store(events, FEEDBACK, names[26::2], SINCE_MS - 1)
    users, found = SqlUsers(database), list[str]()
    while page := await users.eligible(found[-1] if found else "", SINCE_MS, PAGE):
        assert len(page) <= PAGE
        found += page
    assert found == sorted({*names[:40], *names[25::2]})
    assert await users.count_eligible(SINCE_MS) == len(found)


@pytest.mark.slow
def test_page_costs_the_same_when_there_are_more_users(events: sqlite3.Connection) -> None:
    def cost() -> int:
        return steps(events, SELECT_ELIGIBLE, {"after": "", "since": SINCE_MS, "until": END_OF_TIME_MS, "limit": PAGE})

    for statement in (VIEW, FEEDBACK):
        store(events, statement, [f"user-{number:05d}" for number in range(100)])
    few = cost()
    for statement in (VIEW, FEEDBACK):
        store(events, statement, [f"user-{number:05d}" for number in range(100, 10_000)])
    assert cost() <= few + 1


@pytest.mark.slow
def test_page_costs_the_same_when_users_have_more_events(events: sqlite3.Connection) -> None:
    def cost() -> int:
        return steps(events, SELECT_ELIGIBLE, {"after": "", "since": SINCE_MS, "until": SINCE_MS + 1, "limit": PAGE})

    users = [f"user-{number}" for number in range(PAGE)]
    for statement in (VIEW, FEEDBACK):
        store(events, statement, users)
    few = cost()
    for at_ms in (SINCE_MS - 1, SINCE_MS, SINCE_MS + 2):
        store(events, VIEW, users * 500, at_ms)
        store(events, FEEDBACK, users * 500, at_ms)
    assert cost() <= few + 1


async def test_holdings_equal_what_erasing_deletes(database: Database, events: sqlite3.Connection) -> None:
    users = SqlUsers(database)
    store(events, VIEW, ["ann", "ann", "bob"])
    store(events, FEEDBACK, ["ann", "bob", "bob"])
    with events:
        for payload, user in (('{"user_id": "ann"}', None), ("null", "ann"), ('{"user_id": "bob"}', None), ("x", None)):
            events.execute(
                "INSERT INTO dead_letters VALUES (NULL, 'queue', ?, '', '', 1, NULL, ?, 1, 1)", (payload, user)
            )
        for run, listed in (("1", '["ann", "bob"]'), ("2", '["bob"]'), ("3", None)):
            events.execute(
                "INSERT INTO rebuilds VALUES (?, 'x', ?, '[]', 'completed', 0, 0, '', 'admin', 1, 1, 1, 1, NULL)",
                (run, listed),
            )
        events.execute(
            "INSERT INTO rebuilds VALUES ('4', 'x', ?, '[]', 'running', 0, 0, '', 'admin', 1, 1, 1, NULL, NULL)",
            ('["ann", "bob"]',),
        )
    before = await users.holdings("ann")
    assert before == Holdings(views=2, feedback=1, dead_letters=2, rebuilds=2, decisions=0, learned=0)
    assert before.events == 3
    assert await users.erase("ann", 1) == before
    assert await users.holdings("ann") == (0, 0, 0, 0, 0, 0)
    assert await users.holdings("bob") == (1, 2, 1, 3, 0, 0)
    assert events.execute("SELECT user_ids FROM rebuilds WHERE id = '4'").fetchone() == ('["", "bob"]',)


async def test_lists_of_runs_are_searched_twice_however_many_name_the_user(
    database: Database, events: sqlite3.Connection
) -> None:
    run = "INSERT INTO rebuilds VALUES (?, ?, ?, '[]', 'completed', 0, 0, '', 'admin', 1, 1, 1, 1, NULL)"
    with events:
        events.executemany(run, [(str(number), str(number), '["ann", "bob"]') for number in range(20)])
    traced = list[str]()
    await database.write(lambda connection: connection.set_trace_callback(traced.append), of=())  # type: ignore[attr-defined]
    assert (await SqlUsers(database).erase("ann", 1)).rebuilds == 20
    assert len([statement for statement in traced if "json_each(rebuilds.user_ids)" in statement]) == 2


# Few letters, so that prefixes match. Among them are the wildcards of LIKE and GLOB, letters that case folding would
# merge, letters whose order differs between UTF-8 and UTF-16, and a combining mark.
LETTERS = st.sampled_from(
    ["a", "A", "b", "%", "_", "*", "?", "[", "\\", "'", "é", "e", "\u0301", "ß", "ﬀ", "\uffff", "🎯"]
)
IDS = st.lists(LETTERS, min_size=1, max_size=4).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=2 * settings().max_examples)
@given(users=st.lists(IDS, max_size=12), prefix=st.lists(LETTERS, max_size=3).map("".join), limit=st.integers(1, 6))
@pytest.mark.slow
def test_search_equals_a_comparison_of_prefixes(
    events: sqlite3.Connection, users: list[str], prefix: str, limit: int
) -> None:
    events.execute("DELETE FROM event_log")
    log(events, users)
    rows = events.execute(SELECT_BY_PREFIX, {"prefix": prefix, "limit": limit}).fetchall()
    wanted = sorted({user for user in users if user.startswith(prefix)}, key=str.encode)
    assert [user for (user,) in rows] == wanted[:limit]


async def test_search_returns_an_id_before_longer_ones(database: Database, events: sqlite3.Connection) -> None:
    log(events, ["adam", "ada", "ad", "bea", "ada"])
    users = SqlUsers(database)
    assert await users.find("ada", 10) == ["ada", "adam"]
    assert await users.find("", 2) == ["ad", "ada"]
    assert await users.find("c", 10) == []


@pytest.mark.slow
def test_search_costs_the_same_when_there_are_more_users_and_events(events: sqlite3.Connection) -> None:
    def cost() -> int:
        return steps(events, SELECT_BY_PREFIX, {"prefix": "user-00", "limit": 20})

    log(events, [f"user-{number:05d}" for number in range(100)])
    few = cost()
    log(events, ["user-00003"] * 20_000)
    log(events, [f"user-{number:05d}" for number in range(100, 20_000)])
    assert cost() <= few + 1
