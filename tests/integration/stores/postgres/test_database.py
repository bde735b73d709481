"""Transactions on PostgreSQL: locks, repetition, lost connections and cancelled statements."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import psycopg
import pytest

from app.bandit.learning.attribution import Rules, outcome_rewards
from app.bandit.model.inputs import SPEC_V2
from app.bandit.model.thompson_sampling import Policies
from app.errors import StoreFull, StoreUnavailable
from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from app.stores.postgres.database import PostgresDatabase
from app.stores.sql.database import SERVICE, SPARE_READERS, Connection
from app.stores.sql.learning import SqlLearning
from app.stores.sql.sufficient_statistics import SqlStates
from app.stores.sql.users import SqlUsers
from tests.support.bandit_process import WINDOW_MS, BanditProcess
from tests.support.clock import NOW_MS
from tests.support.database import InterruptedDatabase, nothing
from tests.support.postgres import PostgresServer, StartPostgres
from tests.support.proxy import proxy
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

T = TypeVar("T")
COUNT_UP = "UPDATE service SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE name = ?"
SELECT_RUNNING = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE ? AND {}"
RUNNING = SELECT_RUNNING.format("state = 'active' AND pid <> pg_backend_pid()")
WAITING = SELECT_RUNNING.format("wait_event_type = 'Lock'")
# At the commit, the server ends the connection the first time. A number that was drawn is not rolled back.
DIE_ONCE = (
    "CREATE SEQUENCE deaths",
    """CREATE FUNCTION die_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('deaths') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(10); END IF;
        RETURN NULL;
    END $$""",
    """CREATE CONSTRAINT TRIGGER die_once AFTER INSERT ON ended_sessions DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION die_once()""",
)
INSERT = "INSERT INTO ended_sessions (session_id, expires_at_ms) VALUES (?, 0) ON CONFLICT DO NOTHING"


@pytest.fixture
async def database(postgres_url: PostgresUrl) -> AsyncIterator[PostgresDatabase]:
    opened = await PostgresDatabase.open(postgres_url.url, readers=2)
    yield opened
    await opened.close()


async def counters(database: PostgresDatabase, *names: str) -> None:
    for name in names:
        await database.execute("INSERT INTO service (name, value) VALUES (?, '0')", (name,))


async def counted(database: PostgresDatabase, name: str) -> int:
    return int((await database.row("SELECT value FROM service WHERE name = ?", (name,)))[0])


async def sessions(database: PostgresDatabase) -> int:
    return int((await database.row("SELECT COUNT(*) FROM ended_sessions"))[0])


def read_then_write(connection: Connection, name: str) -> None:
    """Count up, as a repository does that reads a row, computes, and writes it."""
    (value,) = connection.execute("SELECT value FROM service WHERE name = ?", (name,)).fetchone()
    connection.execute("SELECT pg_sleep(0.001)").fetchone()
    connection.execute("UPDATE service SET value = ? WHERE name = ?", (str(int(value) + 1), name))


@pytest.mark.parametrize("of", [["ann"], ["ann", "bob", "ann"], SERVICE], ids=["user", "users", "service"])
async def test_no_update_is_lost_when_processes_write_at_once(database: PostgresDatabase, of: list[str]) -> None:
    await counters(database, "hits")
    others = [await PostgresDatabase.open(database.url, readers=1) for _ in range(3)]
    try:
        await asyncio.gather(
            *(
                one.write(lambda connection: read_then_write(connection, "hits"), of=of)
                for one in (database, *others)
                for _ in range(25)
            )
        )
    finally:
        for one in others:
            await one.close()
    assert await counted(database, "hits") == 100


async def test_no_deadlock_when_sets_of_users_cross(database: PostgresDatabase) -> None:
    """1. One write locks ann; 2. the other must not lock bob before ann."""
    before = await database.row("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    await counters(database, "hits")
    pairs = (["ann", "bob", "cid"], ["cid", "ann"], ["bob", "ann"], ["cid", "bob"])
    await asyncio.gather(
        *(database.write(lambda connection: connection.execute("SELECT 1"), of=pair) for pair in pairs * 25)
    )
    assert await database.row("SELECT COUNT(*) FROM users") == (3,)
    assert await database.row("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == before


async def test_deadlock_is_not_seen_by_a_caller(database: PostgresDatabase) -> None:
    """1. One write updates a, the other b; 2. each waits for the other; 3. the server ends one, which is repeated. It
    may lock its row before the other wakes up; then it happens again."""
    await counters(database, "a", "b")
    both = threading.Barrier(2)
    calls: list[str] = []

    def work(connection: Connection, first: str, second: str) -> None:
        calls.append(first)
        connection.execute(COUNT_UP, (first,))
        if len(calls) <= 2:
            both.wait(PATIENCE_S)
        connection.execute(COUNT_UP, (second,))

    await asyncio.gather(
        database.write(lambda connection: work(connection, "a", "b"), of=()),
        database.write(lambda connection: work(connection, "b", "a"), of=()),
    )
    assert len(calls) >= 3
    assert (await counted(database, "a"), await counted(database, "b")) == (2, 2)


async def test_write_locks_a_user_that_is_erased_while_it_waits(database: PostgresDatabase) -> None:
    """1. One write holds the lock and deletes its row; 2. another waits for it; 3. a third must wait for the second."""
    erased, erasing, inside, leave = (threading.Event() for _ in range(4))

    def erase(connection: Connection) -> None:
        connection.execute("DELETE FROM users WHERE user_id = 'ann'")
        erased.set()
        erasing.wait(PATIENCE_S)

    def hold(connection: Connection) -> None:
        inside.set()
        leave.wait(PATIENCE_S)

    async def waiting() -> bool:
        return bool(await database.row(WAITING, ("%",)) == (1,))

    first = asyncio.create_task(database.write(erase, of=["ann"]))
    await eventually(erased.is_set)
    second = asyncio.create_task(database.write(hold, of=["ann"]))
    await eventually_async(waiting)
    erasing.set()
    await first
    await eventually(inside.is_set)
    third = asyncio.create_task(database.write(lambda connection: connection.execute("SELECT 1"), of=["ann"]))
    await eventually_async(waiting)
    assert not third.done()
    leave.set()
    await asyncio.gather(second, third)
    assert await database.rows("SELECT user_id FROM users") == [("ann",)]


async def running(database: PostgresDatabase, query: str, count: int) -> bool:
    return bool(await database.row(RUNNING, (query,)) == (count,))


async def test_erasure_leaves_no_row_of_the_user(database: PostgresDatabase) -> None:
    users = SqlUsers(database)
    await database.write(lambda connection: connection.execute("SELECT 1"), of=["ann", "bob"])
    await users.erase("ann", 1)
    await users.erase_decisions("ann")
    assert await database.rows("SELECT user_id FROM users") == [("bob",)]


async def test_erasure_leaves_no_range_that_begins_with_the_user(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker cuts a range before the user; 2. the user is erased; 3. the worker commits."""
    monkeypatch.setattr("app.stores.sql.sufficient_statistics.RANGE_USERS", 1)
    process, users = BanditProcess(database), SqlUsers(database)
    for user_id in ("ann", "bob", "cleo"):
        await process.learn_one(user_id)
    assert await process.bandit.states.sum_range(NOW_MS, NOW_MS), "the first range"
    cut, leave = threading.Event(), threading.Event()

    class HeldDatabase(InterruptedDatabase):
        """Holds the transaction that cuts the range, before its commit."""

        async def write(self, work: Callable[[Connection], T], *, of: Collection[str] | None) -> T:
            def held(connection: Connection) -> T:
                made = work(connection)
                cut.set()
                leave.wait(PATIENCE_S)
                return made

            return await super().write(held, of=of)

    async def waiting() -> bool:
        return bool(await database.row(WAITING, ("%",)) == (1,))

    held = SqlStates(HeldDatabase(database, nothing, nothing), SPEC_V2)
    summing = asyncio.create_task(held.sum_range(NOW_MS, NOW_MS))
    await eventually(cut.is_set)
    erasing = asyncio.create_task(users.erase("bob", 1))
    await eventually_async(waiting)
    leave.set()
    await asyncio.gather(summing, erasing)
    assert await database.rows("SELECT first_user FROM pooled_ranges") == [("",)]


async def test_row_that_a_write_stored_after_the_erasure_is_deleted_with_old_decisions(
    database: PostgresDatabase,
) -> None:
    """1. A worker chooses users; 2. one is erased; 3. the worker locks them all. A user who is locked is left alone."""
    process = BanditProcess(database)
    made = {user_id: await process.decide(user_id) for user_id in ("ann", "bob", "cleo")}
    await process.serve(made["bob"])
    await process.learn_one("cleo")
    await process.execute("DELETE FROM tip_scores WHERE user_id = 'cleo'")
    users = SqlUsers(database)

    async def erase() -> None:
        await users.erase("ann", 1)
        await users.erase_decisions("ann")

    learning = SqlLearning(
        InterruptedDatabase(database, nothing, erase), Policies(), Rules(outcome_rewards(), WINDOW_MS)
    )
    await learning.settle(NOW_MS + 2 * WINDOW_MS, 9)
    await database.write(lambda connection: connection.execute("SELECT 1"), of=["dan"])
    locked, leave = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        locked.set()
        leave.wait(PATIENCE_S)

    holding = asyncio.create_task(database.write(hold, of=["dan"]))
    await eventually(locked.is_set)
    assert ("ann",) in await database.rows("SELECT user_id FROM users")
    assert await process.retention.prune(NOW_MS - 1, 9) == 0
    leave.set()
    await holding
    assert await database.rows("SELECT user_id FROM users ORDER BY user_id") == [("bob",), ("cleo",), ("dan",)]


async def test_write_is_repeated_when_the_idle_connection_was_lost(database: PostgresDatabase) -> None:
    await database.execute(INSERT, ("a",))
    await database.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    await database.execute(INSERT, ("b",))
    assert await sessions(database) == 2


@pytest.mark.parametrize("reused", [False, True])
async def test_write_is_repeated_when_the_connection_is_lost_before_the_commit(
    database: PostgresDatabase, reused: bool
) -> None:
    if reused:
        await database.execute(INSERT, ("a",))
    calls: list[int] = []

    def work(connection: Connection) -> None:
        calls.append(1)
        connection.execute(INSERT, ("b",))
        if len(calls) == 1:
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    await database.write(work, of=["ann"])
    assert (len(calls), await sessions(database)) == (2, 1 + reused)


async def test_callers_are_told_no_address_of_the_server() -> None:
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1") as caught:
        await PostgresDatabase.open("postgresql://nobody@127.0.0.1:1/x", readers=1)
    assert caught.value.public_reason == "no server that accepts writes can be reached"


@pytest.mark.parametrize("again", [False, True])
async def test_lost_commit_is_repeated_only_when_asked(database: PostgresDatabase, again: bool) -> None:
    await database.execute("SELECT 1")
    for statement in DIE_ONCE:
        await database.execute(statement)

    def work(connection: Connection) -> None:
        connection.execute(INSERT, ("a",))

    if again:
        await database.write(work, of=(), again=True)
        assert await sessions(database) == 1
        return
    with pytest.raises(StoreUnavailable, match="it may have been made"):
        await database.write(work, of=())
    assert await sessions(database) == 0
    await database.write(work, of=())
    assert await sessions(database) == 1


async def test_repeated_commit_stores_nothing_twice(postgres: PostgresServer, database: PostgresDatabase) -> None:
    """1. The commit is made; 2. its answer is lost; 3. the work is done again, and finds its row."""
    await database.execute(
        """CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'"""
    )
    await database.execute(
        """CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON ended_sessions DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait()"""
    )
    socket = Path(str(postgres.data.parent)) / f".s.PGSQL.{postgres.port}"
    name = urlsplit(database.url).path

    async def committing() -> bool:
        return bool(await database.row(RUNNING, ("COMMIT",)) == (1,))

    with closing(psycopg.connect(database.url, autocommit=True)) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        async with proxy(socket) as between:
            remote = await PostgresDatabase.open(f"postgresql://profiles@127.0.0.1:{between.port}{name}", readers=1)
            try:
                await remote.execute("SELECT 1")
                writing = asyncio.create_task(
                    remote.write(lambda connection: connection.execute(INSERT, ("a",)).rowcount, of=(), again=True)
                )
                await eventually_async(committing)
                between.silence()
                gate.close()
                await eventually_async(lambda: stored(database))
                between.cut()
                between.mend()
                assert await writing == 0
            finally:
                await remote.close()
    assert await sessions(database) == 1


async def stored(database: PostgresDatabase) -> bool:
    return await sessions(database) == 1


async def test_statement_is_cancelled_when_the_caller_is_cancelled(database: PostgresDatabase) -> None:
    slow = [
        asyncio.create_task(database.rows("SELECT pg_sleep(60)")),
        asyncio.create_task(database.execute("SELECT pg_sleep(60)")),
    ]
    await eventually_async(lambda: running(database, "SELECT pg_sleep%", 2))
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert all(task.cancelled() for task in slow)
    await eventually_async(lambda: running(database, "SELECT pg_sleep%", 0))
    reads = [database.row("SELECT 1") for _ in range(20)]
    writes = [database.execute(INSERT, (str(number),)) for number in range(20)]
    assert await asyncio.gather(*reads, *writes) == [(1,)] * 20 + [1] * 20


async def test_cancelling_never_stops_the_statement_of_another_caller(database: PostgresDatabase) -> None:
    """1. A caller is cancelled; 2. its statement has just ended; 3. the connection must not run another one yet."""
    for pause_s in [0.0, 0.001, 0.002] * 20:
        cancelled = [asyncio.create_task(database.rows("SELECT pg_sleep(0.001)")) for _ in range(3)]
        others = [asyncio.create_task(database.row("SELECT 1, pg_sleep(0.002)")) for _ in range(3)]
        await asyncio.sleep(pause_s)
        for task in cancelled:
            task.cancel()
        assert [row[0] for row in await asyncio.gather(*others)] == [1, 1, 1]


async def test_waiting_callers_are_told_when_the_database_closes(postgres_url: PostgresUrl) -> None:
    database = await PostgresDatabase.open(postgres_url.url, readers=1)
    tasks = [asyncio.create_task(database.rows("SELECT pg_sleep(60)")) for _ in range(5)]
    other = await PostgresDatabase.open(postgres_url.url, readers=1)
    await eventually_async(lambda: running(other, "SELECT pg_sleep%", 1 + SPARE_READERS))
    await database.close()
    assert {type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)} == {StoreUnavailable}
    await other.close()


async def test_error_in_the_work_rolls_back_and_the_connection_stays_usable(database: PostgresDatabase) -> None:
    def work(connection: Connection) -> None:
        connection.execute(INSERT, ("a",))
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        await database.write(work, of=["ann"])
    assert await sessions(database) == 0
    assert await database.execute(INSERT, ("a",)) == 1


@pytest.mark.parametrize(("state", "full"), [("53100", True), ("53200", False)], ids=["disk", "memory"])
async def test_only_a_full_disk_is_full(database: PostgresDatabase, state: str, full: bool) -> None:
    refuse = f"DO $$ BEGIN RAISE EXCEPTION 'out of shared memory' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(StoreUnavailable, match="out of shared memory") as raised:
        await database.execute(refuse)
    assert (isinstance(raised.value, StoreFull), database.full) == (full, full)


async def test_nul_in_a_text_is_replaced(database: PostgresDatabase) -> None:
    await database.execute(INSERT, ("a\0b",))
    assert await database.rows("SELECT session_id FROM ended_sessions") == [("a\ufffdb",)]


async def test_learning_waits_for_no_row_that_users_share(database: PostgresDatabase) -> None:
    process, held, release = BanditProcess(database), threading.Event(), threading.Event()
    await process.learn_one("ann")
    assert await process.pool()

    def hold(connection: Connection) -> None:
        for table in ("bandit_ledger", "pooled_ranges", "bandit_priors", "rollout"):
            connection.execute(f"SELECT 1 FROM {table} FOR UPDATE")
        held.set()
        release.wait(PATIENCE_S)

    holding = asyncio.create_task(database.write(hold, of=SERVICE))
    try:
        await eventually(held.is_set)
        async with asyncio.timeout(30):
            await process.learn_one("bob")
    finally:
        release.set()
        await holding
    assert await database.row("SELECT decisions FROM bandit_states WHERE user_id = 'bob'") == (1,)


async def test_write_raises_when_a_standby_does_not_confirm_the_commit(
    database: PostgresDatabase, postgres: PostgresServer
) -> None:
    """A cancelled COMMIT does not wait for the standby any more, and the server reports it as made."""
    postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'missing'")
    postgres.execute("SELECT pg_reload_conf()")
    writes: list[asyncio.Task[int]] = []

    def cancelled() -> bool:
        # The server does not wait for the standby before all its processes have reloaded the configuration.
        if not writes or writes[-1].done():
            writes.append(asyncio.create_task(database.execute(INSERT, (f"session-{len(writes)}",))))
        waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        return postgres.execute(waiting) == [(True,)]

    try:
        await eventually(cancelled)
        with pytest.raises(StoreUnavailable, match="no standby has confirmed"):
            await writes[-1]
    finally:
        postgres.execute("ALTER SYSTEM RESET synchronous_standby_names")
        postgres.execute("SELECT pg_reload_conf()")
    await database.execute(INSERT, ("last",))
    assert await sessions(database) == len(writes) + 1


@contextmanager
def silent_host() -> Iterator[str]:
    """The address of a host that answers no attempt to connect: the queue of its socket is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, socket.socket() as queued:
        queued.connect(listening.getsockname())
        yield "{}:{}".format(*listening.getsockname())


async def test_second_host_is_reached_when_the_first_is_silent(
    postgres: PostgresServer, postgres_url: PostgresUrl
) -> None:
    with silent_host() as first:
        hosts = f"{first},127.0.0.1:{postgres.port}"
        database = await PostgresDatabase.open(f"postgresql://profiles@{hosts}{urlsplit(postgres_url.url).path}", 1)
        try:
            assert database.id
            assert await database.row("SELECT 1") == (1,)
        finally:
            await database.close()


async def test_query_of_the_state_fails_soon_when_the_server_is_frozen(start_postgres: StartPostgres) -> None:
    server = start_postgres()
    migrate(parsed(server.url()))
    database = await PostgresDatabase.open(server.url(), readers=1)
    try:
        server.signal(signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(2):  # on the open connection, and while the next one is opened
                with pytest.raises(StoreUnavailable, match="does not answer in time"):
                    await database.state.query()
        server.signal(signal.SIGCONT)
        await eventually_async(lambda: answers(database))
    finally:
        server.signal(signal.SIGCONT)
        await database.close()
        server.close()


async def test_read_fails_soon_when_a_pooler_answers_for_a_frozen_server(
    postgres: PostgresServer, postgres_url: PostgresUrl
) -> None:
    socket = Path(str(postgres.data.parent)) / f".s.PGSQL.{postgres.port}"
    async with proxy(socket) as between:
        url = f"postgresql://profiles@127.0.0.1:{between.port}{urlsplit(postgres_url.url).path}"
        database = await PostgresDatabase.open(url, readers=1)
        try:
            between.hold(b"set_config")  # the first statement of a connection
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(StoreUnavailable):
                    await database.row("SELECT 1")
            between.mend()
            assert await database.row("SELECT 1") == (1,)
        finally:
            between.mend()
            await database.close()


async def answers(database: PostgresDatabase) -> bool:
    try:
        return bool((await database.state.query()).database_id)
    except StoreUnavailable:
        return False
