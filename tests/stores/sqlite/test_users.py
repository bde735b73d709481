"""Pages of eligible users: everybody once, at a cost that does not grow with those who are left."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.events.ports import Holdings
from app.stores.sqlite.database import Database
from app.stores.sqlite.users import SELECT_ELIGIBLE, SqliteUsers

VIEW = "INSERT INTO tip_views VALUES (NULL, ?, 'tip', ?, 0, ?, NULL)"
FEEDBACK = "INSERT INTO tip_feedback VALUES (NULL, ?, 'tip', ?, 0, ?, NULL, 'completed', NULL)"
SINCE_MS, PAGE = 1_000, 10


@pytest.fixture
def events(database_path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to store facts with, beside whatever uses the database."""
    with closing(sqlite3.connect(database_path)) as connection:
        yield connection


def store(connection: sqlite3.Connection, statement: str, users: list[str], at_ms: int = SINCE_MS) -> None:
    """A fact of each user."""
    with connection:
        connection.executemany(statement, [(user, at_ms, at_ms) for user in users])


async def test_pages_hold_every_user_once_when_some_have_events_of_both_kinds(
    database: Database, database_path: Path, events: sqlite3.Connection
) -> None:
    names = [f"user-{number:03d}" for number in range(60)]
    store(events, VIEW, names[:40])
    store(events, VIEW, names[:40])
    store(events, FEEDBACK, names[25::2])
    store(events, FEEDBACK, names[26::2], SINCE_MS - 1)
    users, found = SqliteUsers(database), list[str]()
    while page := await users.eligible(found[-1] if found else "", SINCE_MS, PAGE):
        assert len(page) <= PAGE
        found += page
    assert found == sorted({*names[:40], *names[25::2]})
    assert await users.count_eligible(SINCE_MS) == len(found)


def test_page_costs_the_same_when_there_are_many_more_users(events: sqlite3.Connection) -> None:
    def steps() -> int:
        """Hundreds of steps that SQLite takes for the first page."""
        taken = [0]

        def count() -> None:
            taken[0] += 1

        events.set_progress_handler(count, 100)
        events.execute(SELECT_ELIGIBLE, {"after": "", "since": SINCE_MS, "limit": PAGE}).fetchall()
        events.set_progress_handler(None, 0)
        return taken[0]

    for statement in (VIEW, FEEDBACK):
        store(events, statement, [f"user-{number:05d}" for number in range(100)])
    few = steps()
    for statement in (VIEW, FEEDBACK):
        store(events, statement, [f"user-{number:05d}" for number in range(100, 10_000)])
    assert steps() <= few + 1


async def test_holdings_are_what_erasing_then_deletes(database: Database, events: sqlite3.Connection) -> None:
    users = SqliteUsers(database)
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
    before = await users.holdings("ann")
    assert before == Holdings(views=2, feedback=1, dead_letters=2, rebuilds=1)
    assert before.events == 3
    assert await users.erase("ann", 1) == before
    assert await users.holdings("ann") == (0, 0, 0, 0)
    assert await users.holdings("bob") == (1, 2, 1, 1)
