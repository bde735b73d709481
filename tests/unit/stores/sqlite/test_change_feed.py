"""The change feed names the user of each committed event once, whichever process committed it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from app.errors import StoreUnavailable
from app.features.events import FEEDBACK, SERVED
from app.stores.sql.cache_state import SqlOwedInvalidations, clear_local_caches
from app.stores.sql.users import SqlUsers
from app.stores.sqlite.data_version import SELECT_NEWEST, TAIL_CAP, DataVersion, SqliteChangeFeed
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.database import steps
from tests.support.events import admitted, feedback, served

NONE: frozenset[str] = frozenset()


@pytest.fixture
def feed(database: SqliteDatabase) -> Iterator[SqliteChangeFeed]:
    data_version = DataVersion(database.path)
    yield SqliteChangeFeed(data_version)
    data_version.close()


async def store(database: SqliteDatabase, *users: str) -> None:
    await SqliteEventLog(database).append([[admitted(served(user)) for user in users]])


async def test_user_of_each_event_is_named_once(database: SqliteDatabase, feed: SqliteChangeFeed) -> None:
    assert feed.changed_users() == NONE
    await store(database, "ann", "bob", "ann")
    assert feed.changed_users() == frozenset({"ann", "bob"})
    assert feed.changed_users() == NONE
    await store(database, "cid")
    await store(database, "dan")
    assert feed.changed_users() == frozenset({"cid", "dan"})


async def test_no_user_is_named_when_the_events_are_older_than_the_feed(database: SqliteDatabase) -> None:
    await store(database, "ann")
    with closing(DataVersion(database.path)) as data_version:
        assert SqliteChangeFeed(data_version).changed_users() == NONE


async def test_no_user_is_named_when_a_commit_stores_no_event(database: SqliteDatabase, feed: SqliteChangeFeed) -> None:
    await database.write(lambda connection: connection.execute("UPDATE outbox SET attempts = attempts + 1"), of=())
    assert feed.changed_users() == NONE


async def test_changed_users_is_none_when_local_caches_are_cleared(
    database: SqliteDatabase, feed: SqliteChangeFeed
) -> None:
    for _ in range(2):
        await clear_local_caches(database)
        await store(database, "ann")
        assert feed.changed_users() is None
        assert feed.changed_users() == NONE


async def test_changed_users_is_none_when_there_are_too_many_events(
    database: SqliteDatabase, feed: SqliteChangeFeed
) -> None:
    await store(database, *(f"user {number}" for number in range(TAIL_CAP)))
    assert len(feed.changed_users() or ()) == TAIL_CAP
    await store(database, *(f"user {number}" for number in range(TAIL_CAP + 1)))
    assert feed.changed_users() is None
    await store(database, "ann")
    assert feed.changed_users() == frozenset({"ann"})


async def test_later_users_are_named_after_an_erasure(database: SqliteDatabase, feed: SqliteChangeFeed) -> None:
    await store(database, "ann", "bob")
    assert feed.changed_users() == frozenset({"ann", "bob"})
    await SqlUsers(database).erase("bob", 1)
    await store(database, "cid")
    assert feed.changed_users() is None, "an erasure clears local caches"
    await store(database, "dan")
    assert feed.changed_users() == frozenset({"dan"})


async def test_newest_events_are_given_by_subject(database: SqliteDatabase, feed: SqliteChangeFeed) -> None:
    assert feed.newest("ann") == {}
    await store(database, "ann", "ann", "bob")
    assert feed.newest("ann") == {SERVED: 2}
    await SqliteEventLog(database).append([[admitted(feedback("ann"))]])
    assert feed.newest("ann") == {SERVED: 2, FEEDBACK: 4}


async def test_newest_events_cost_the_same_when_many_invalidations_are_owed(
    database: SqliteDatabase, feed: SqliteChangeFeed
) -> None:
    owed, costs = SqlOwedInvalidations(database), list[int]()
    for users in (["bob"], [f"user-{number}" for number in range(2_000)]):
        await owed.owe(users, 1)
        assert feed.newest("ann") is None
        with closing(sqlite3.connect(database.path)) as connection:
            costs.append(steps(connection, SELECT_NEWEST, {"user": "ann"}))
    assert costs[1] <= costs[0] + 1


async def test_feed_raises_when_the_database_does_not_answer(database: SqliteDatabase) -> None:
    data_version = DataVersion(database.path)
    feed = SqliteChangeFeed(data_version)
    data_version.close()
    with pytest.raises(StoreUnavailable):
        feed.changed_users()
    with pytest.raises(StoreUnavailable):
        feed.newest("ann")
