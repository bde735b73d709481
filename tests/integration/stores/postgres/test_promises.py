"""The promises on PostgreSQL: versions that rise in the order of commits, sums that lose nothing, and failover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from app.errors import StoreUnavailable
from app.features.registry import Registry
from app.profiles.ports import Cell, ComputeRow
from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from app.stores.postgres import database as transactions
from app.stores.postgres import event_log, pool
from app.stores.postgres.connection import Connection
from app.stores.postgres.database import PostgresDatabase
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.bandit_process import BanditProcess, feedback_for
from tests.support.database import open_again
from tests.support.entries import entry
from tests.support.events import feedback, served
from tests.support.postgres import USER, PostgresServer, StartPostgres
from tests.support.registry import REGISTRY
from tests.support.service import PausableService, assert_true
from tests.support.service_group import ServiceGroup
from tests.support.waiting import eventually_async

FEEDBACKS = 200
# The first number that is drawn waits, after it was drawn, for an advisory lock that the test holds.
GATE = 7
WAIT_ONCE = (
    "CREATE SEQUENCE draws",
    f"""CREATE FUNCTION draw(wanted bigint) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
    BEGIN
        RETURN QUERY SELECT nextval('event_seq') FROM generate_series(1, wanted);
        IF nextval('draws') = 1 THEN PERFORM pg_advisory_xact_lock({GATE}); END IF;
    END $$""",
    """CREATE FUNCTION draw_and_lock(wanted bigint) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
    BEGIN
        RETURN QUERY SELECT draw(wanted);
        INSERT INTO users (user_id) VALUES ('ann') ON CONFLICT DO NOTHING;
        PERFORM 1 FROM users WHERE user_id = 'ann' FOR UPDATE;
    END $$""",
)
WAITING = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
VOLUME = "tip_volume_30d"


@contextmanager
def gate(url: PostgresUrl) -> Iterator[Callable[[], Any]]:
    """Hold the lock for which the first draw waits. Yields the number of sessions that wait for any lock."""
    with closing(psycopg.connect(url.url, autocommit=True)) as connection:
        for statement in WAIT_ONCE:
            connection.execute(statement)
        connection.execute(f"SELECT pg_advisory_lock({GATE})")
        yield lambda: connection.execute(WAITING).fetchone()


async def test_version_names_the_events_that_a_value_counts(
    postgres_url: PostgresUrl, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _draw_while_another_writes(postgres_url, valkey, monkeypatch, "draw")


async def test_wrong_version_is_found_when_numbers_are_drawn_before_the_lock(
    postgres_url: PostgresUrl, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = transactions._begin
    monkeypatch.setattr(
        transactions,
        "_begin",
        lambda connection, first, users: begin(connection, first, None if users is None else []),
    )
    with pytest.raises(AssertionError, match="another value at the same version"):
        await _draw_while_another_writes(postgres_url, valkey, monkeypatch, "draw_and_lock")


async def _draw_while_another_writes(
    url: PostgresUrl, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, draw: str
) -> None:
    """1. T1 draws its number; 2. T2 writes an event of the same user; 3. a profile is read, before T1 commits."""
    monkeypatch.setattr(event_log, "DRAW_NUMBERS", f"SELECT * FROM {draw}(?)")
    async with ServiceGroup(url, valkey) as group:
        one, other = await group.open(), await group.open()
        with gate(url) as waiting:

            async def waits(count: int) -> bool:
                return bool(waiting()[0] >= count)

            first = await group.started(one.send(served("ann")))
            await eventually_async(lambda: waits(1))
            second = await group.started(other.send(feedback("ann")))

            async def settled() -> bool:
                return second.done() or await waits(2)

            await eventually_async(settled)
            values, read = await other.reader.read_recorded("ann")
        await asyncio.gather(first, second)
        version = max(value.version for value in read.values.values())
        asked = ComputeRow("ann", REGISTRY.full_mask, read.at_ms, version=version)
        (repeated,) = await one.reader.read_as_of([asked])
        assert one.decoded(repeated) == values, "another value at the same version"


async def test_event_deletes_a_feature_that_is_announced_meanwhile(
    postgres_url: PostgresUrl, valkey: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. T1 reads the names of the features and draws its number; 2. another process announces a feature, computes and
    caches it; 3. T1 commits, and deletes the keys of the features that it has read."""
    monkeypatch.setattr(event_log, "DRAW_NUMBERS", "SELECT * FROM draw(?)")
    async with ServiceGroup(postgres_url, valkey) as group:
        one = await group.open()
        with gate(postgres_url) as waiting:

            async def waits(count: int) -> bool:
                return bool(waiting()[0] >= count)

            async def read_new() -> PausableService:
                opened = await group.open(Registry([*REGISTRY, entry(name="new")]))
                await opened.features("ann")
                await opened.drain()
                return opened

            sending = await group.started(one.send(served("ann")))
            await eventually_async(lambda: waits(1))
            reading = await group.started(read_new())

            async def settled() -> bool:
                return reading.done() or await waits(2)

            await eventually_async(settled)
        await sending
        await assert_true([await reading], "ann")


async def test_concurrent_feedback_of_one_user_is_learned_once(postgres_url: PostgresUrl) -> None:
    """Four workers; the statistics are then the sums over the decisions in any order."""
    database = await PostgresDatabase.open(postgres_url.url, readers=2)
    others = [await open_again(database) for _ in range(3)]
    workers = [BanditProcess(each) for each in (database, *others)]
    decisions = [await workers[0].decide("ann") for _ in range(FEEDBACKS)]
    now_ms = workers[0].clock.now_ms()
    try:
        await asyncio.gather(
            *(
                workers[place % 4].consume(feedback_for(decision, now_ms, "completed" if place % 3 else "dismissed"))
                for place, decision in enumerate(decisions)
            )
        )
        assert (await workers[0].statistics("ann")).decisions == FEEDBACKS
        await workers[0].assert_learned_once()
    finally:
        for worker in workers:
            await worker.close()
            await worker.database.close()


@pytest.fixture(scope="module")
def pair(start_postgres: StartPostgres) -> tuple[PostgresServer, PostgresServer]:
    """A primary with a migrated database `app`, and its synchronous standby."""
    primary = start_postgres(synchronous_commit="on")
    primary.execute("CREATE DATABASE app")
    migrate(parsed(primary.url("app")))
    standby = primary.standby("other")
    return primary, standby


@pytest.fixture
async def service(
    pair: tuple[PostgresServer, PostgresServer], valkey: EmbeddedServer
) -> AsyncIterator[PausableService]:
    """A process that is given the addresses of both servers, that of the standby first."""
    hosts = ",".join(f"{server.host}:{server.port}" for server in reversed(pair))
    async with ServiceGroup(parsed(f"postgresql://{USER}@{hosts}/app"), valkey) as group:
        yield await group.open()


async def volume(service: PausableService, user_id: str) -> object:
    return (await service.features(user_id))[VOLUME]


async def lagging_read(service: PausableService, standby: PostgresServer, user_id: str) -> object:
    """The volume that is read after an event, while the standby does not replay what it receives."""
    standby.execute("SELECT pg_wal_replay_pause()")
    try:
        await service.send(served(user_id))
        return await volume(service, user_id)
    finally:
        standby.execute("SELECT pg_wal_replay_resume()")


async def test_read_is_right_when_a_standby_lags(
    pair: tuple[PostgresServer, PostgresServer], service: PausableService
) -> None:
    assert await lagging_read(service, pair[1], "ann") == 1


async def test_stale_read_is_found_when_a_standby_is_read(
    pair: tuple[PostgresServer, PostgresServer], service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = pair[1]

    def open_on_standby(lent: pool.PooledConnection) -> Connection:
        raw = psycopg.connect(standby.url("app"), autocommit=True, cursor_factory=psycopg.RawCursor)
        lent.connection = Connection(raw)
        lent.connection.server = service.database.id
        return lent.connection

    assert isinstance(service.database, PostgresDatabase)
    mutant = pool.Pool("", 2, service.database.state)
    await service.send(served("someone"))  # the connection that writes is open
    monkeypatch.setattr(pool.PooledConnection, "_open", open_on_standby)
    monkeypatch.setattr(Connection, "begin_session", lambda connection: None)
    monkeypatch.setattr(service.source.inner, "_readers", mutant)
    try:
        assert await lagging_read(service, standby, "bob") == 0, "the mutant was not noticed"
    finally:
        await mutant.close()


async def test_cache_is_left_behind_when_the_synchronous_standby_is_promoted(
    pair: tuple[PostgresServer, PostgresServer], service: PausableService
) -> None:
    """Runs last: the primary of this module is gone afterwards."""
    primary, standby = pair
    await service.send(served("cid"), served("cid"))
    assert await volume(service, "cid") == 2
    await service.drain()
    before, held = await service.cache.inner.read([Cell("cid", VOLUME)])
    assert held != [None]
    primary.kill()
    await asyncio.to_thread(standby.promote)

    async def answers() -> bool:
        service.clock.advance(51)  # the last look at the database is too old
        try:
            return await volume(service, "cid") == 2
        except StoreUnavailable:
            return False

    await eventually_async(answers)
    await service.reconnected()
    after, _ = await service.cache.inner.read([Cell("cid", VOLUME)])
    assert after != before
    await service.send(served("cid"))
    assert await volume(service, "cid") == 3
