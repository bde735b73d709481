"""The tail of the event log: every committed event is told of once, whoever committed it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import StoreUnavailable
from app.features.events import FEEDBACK, SERVED
from app.stores.sqlite.change_feed import TAIL_CAP, SqliteChangeFeed, clear_local_caches
from app.stores.sqlite.data_version import DataVersion
from app.stores.sqlite.database import Database
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.users import SqliteUsers
from tests.support.events import admitted, feedback, served

NOBODY: frozenset[str] = frozenset()


@pytest.fixture
async def database(database_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(database_path, 1)
    yield opened
    await opened.close()


@pytest.fixture
def tail(database: Database) -> Iterator[SqliteChangeFeed]:
    data_version = DataVersion(database.path)
    yield SqliteChangeFeed(data_version)
    data_version.close()


async def store(database: Database, *users: str) -> None:
    await SqliteEventLog(database).append([[admitted(served(user)) for user in users]])


async def test_each_event_is_told_of_once_when_it_was_committed(database: Database, tail: SqliteChangeFeed) -> None:
    assert tail.look() == NOBODY
    await store(database, "ann", "bob", "ann")
    assert tail.look() == frozenset({"ann", "bob"})
    assert tail.look() == NOBODY
    await store(database, "cid")
    await store(database, "dan")
    assert tail.look() == frozenset({"cid", "dan"})


async def test_nothing_is_told_of_when_the_events_came_before_the_first_look(database: Database) -> None:
    await store(database, "ann")
    with closing(DataVersion(database.path)) as data_version:
        assert SqliteChangeFeed(data_version).look() == NOBODY


async def test_nobody_is_named_when_a_commit_was_about_something_else(
    database: Database, tail: SqliteChangeFeed
) -> None:
    await database.write(lambda connection: connection.execute("UPDATE event_log SET attempts = attempts + 1"))
    assert tail.look() == NOBODY


async def test_everything_is_to_be_forgotten_when_it_was_recalled(database: Database, tail: SqliteChangeFeed) -> None:
    for _ in range(2):
        await clear_local_caches(database)
        await store(database, "ann")
        assert tail.look() is None
        assert tail.look() == NOBODY


async def test_everything_is_to_be_forgotten_when_too_much_came_at_once(
    database: Database, tail: SqliteChangeFeed
) -> None:
    await store(database, *(f"user {number}" for number in range(TAIL_CAP)))
    assert len(tail.look() or ()) == TAIL_CAP
    await store(database, *(f"user {number}" for number in range(TAIL_CAP + 1)))
    assert tail.look() is None
    await store(database, "ann")
    assert tail.look() == frozenset({"ann"})


async def test_later_events_are_told_of_when_the_newest_was_erased(database: Database, tail: SqliteChangeFeed) -> None:
    await store(database, "ann", "bob")
    assert tail.look() == frozenset({"ann", "bob"})
    await SqliteUsers(database).erase("bob", 1)
    await store(database, "cid")
    assert tail.look() is None, "an erasure recalls"
    await store(database, "dan")
    assert tail.look() == frozenset({"dan"})


async def test_the_newest_event_is_known_by_subject_when_there_are_several(
    database: Database, tail: SqliteChangeFeed
) -> None:
    assert tail.newest("ann") == {}
    await store(database, "ann", "ann", "bob")
    assert tail.newest("ann") == {SERVED: 2}
    await SqliteEventLog(database).append([[admitted(feedback("ann"))]])
    assert tail.newest("ann") == {SERVED: 2, FEEDBACK: 4}


async def test_what_fails_is_said_when_the_database_does_not_answer(database: Database) -> None:
    data_version = DataVersion(database.path)
    tail = SqliteChangeFeed(data_version)
    data_version.close()
    with pytest.raises(StoreUnavailable):
        tail.look()
    with pytest.raises(StoreUnavailable):
        tail.newest("ann")
