"""All processes agree on which server is the cache, or use none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

import app.bootstrap.servers
from app.bootstrap.service import OpenService, open_service
from app.errors import CacheRefused
from app.events.admission import from_queue
from app.features.clock import rfc3339
from app.features.events import TipEvent
from app.settings import Settings
from app.stores.sqlite.database import Database
from app.stores.sqlite.owed_invalidations import SqliteOwedInvalidations
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.server_registration import HOLD_BACK_S, ServerRegistration
from tests.support.clock import FakeClock
from tests.support.proxy import Proxy, proxy
from tests.support.registry import FEATURES
from tests.support.servers import VALKEY, StartServer
from tests.support.waiting import eventually

VOLUME = 4


class World:
    """Two processes over one database, each with a way of its own to the cache."""

    def __init__(self, first: OpenService, second: OpenService, ways: tuple[Proxy, Proxy]) -> None:
        self.first = first
        self.second = second
        self.ways = ways
        self.sent = 0

    def served(self) -> TipEvent:
        self.sent += 1
        at = rfc3339(self.first.clock.now_ms() - 1_000)
        raw = {"subject": "signals.tip.served", "event_id": f"e{self.sent}", "user_id": "ada", "tip_id": "t"}
        return from_queue({**raw, "occurred_at": at}, "event")

    async def volume(self, service: OpenService) -> tuple[int, bool]:
        reading = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
        return int(reading.json), reading.cached

    async def until_hit(self, service: OpenService) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 10
        while not (await self.volume(service))[1]:
            assert loop.time() < deadline, "no hit came back"


@asynccontextmanager
async def world(database_path: Path, server: EmbeddedServer) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        ways = (
            await stack.enter_async_context(proxy(server.socket_path)),
            await stack.enter_async_context(proxy(server.socket_path)),
        )
        services = [
            await stack.enter_async_context(
                open_service(Settings(features=FEATURES, database=database_path, cache_url=way.url), door="http")
            )
            for way in ways
        ]
        yield World(services[0], services[1], ways)


async def move(way: Proxy, server: EmbeddedServer) -> None:
    """New connections of one process reach another server; those it has break."""
    way.target = server.socket_path
    way.cut()
    way.mend()


async def test_read_is_right_when_another_process_deletes_on_another_server(
    database_path: Path, start_server: StartServer
) -> None:
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with world(database_path, old) as two:
        await two.first.ingestor.ingest([two.served()])
        await two.volume(two.second)
        await two.until_hit(two.second)
        await move(two.ways[0], new)
        receipt = await two.first.ingestor.ingest([two.served()])
        assert not receipt.invalidated
        assert await two.volume(two.second) == (2, False)
        await move(two.ways[1], new)
        await two.until_hit(two.second)
        assert await two.volume(two.second) == (2, True)
        assert (await two.first.ingestor.ingest([two.served()])).invalidated
        assert (await two.volume(two.second))[0] == 3


async def test_read_is_stale_when_the_registration_is_left_out(
    database_path: Path, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without the registration the reader hits what the old server still holds."""
    monkeypatch.setattr(app.bootstrap.servers, "ServerRegistration", lambda *_: None)
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with world(database_path, old) as two:
        await two.first.ingestor.ingest([two.served()])
        await two.volume(two.second)
        await two.until_hit(two.second)
        await move(two.ways[0], new)
        stale = 0
        for _ in range(5):
            await two.first.ingestor.ingest([two.served()])
            value, cached = await two.volume(two.second)
            stale += cached and value < two.sent
        assert stale > 0


@pytest.mark.slow
async def test_old_contents_are_out_of_reach_when_a_server_comes_back(
    database_path: Path, start_server: StartServer
) -> None:
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with world(database_path, old) as two:
        await two.first.ingestor.ingest([two.served()])
        await two.volume(two.first)
        await two.until_hit(two.first)
        for server in (new, old, new, old):
            for way in two.ways:
                await move(way, server)
            await two.first.ingestor.ingest([two.served()])
            for service in (two.first, two.second):
                assert (await two.volume(service))[0] == two.sent
            await two.until_hit(two.first)
            assert (await two.volume(two.second))[0] == two.sent


@pytest.fixture
async def book(database: Database) -> AsyncIterator[SqliteOwedInvalidations]:
    owed = SqliteOwedInvalidations(database)
    yield owed
    owed.close()


async def test_one_of_two_wins_when_both_register(database: Database, book: SqliteOwedInvalidations) -> None:
    clock = FakeClock()
    first, second = ServerRegistration(book.registration, clock), ServerRegistration(book.registration, clock)
    await first.register("a" * 40)
    await book.registration.register("b" * 40, 0)  # made for the generation before: too late
    await second.register("a" * 40)
    assert book.registration.query() == ("a" * 40, 1)
    assert first.generation("a" * 40) == second.generation("a" * 40) == 1


async def test_unregistered_server_is_refused_and_registered_soon(book: SqliteOwedInvalidations) -> None:
    clock = FakeClock()
    registration = ServerRegistration(book.registration, clock)
    await registration.register("a" * 40)
    with pytest.raises(CacheRefused):
        registration.generation("b" * 40)
    await eventually(lambda: book.registration.query()[0] == "b" * 40)
    assert registration.generation("b" * 40) == 2
    await registration.close()


async def test_deletion_counts_only_when_older_looks_have_expired(book: SqliteOwedInvalidations) -> None:
    clock = FakeClock()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        clock.advance(int(seconds * 1000))

    registration = ServerRegistration(book.registration, clock, pause)
    await registration.register("a" * 40)
    clock.advance(30)
    await registration.settle()
    await registration.settle()
    assert pauses == [pytest.approx(HOLD_BACK_S - 0.03)]


async def test_no_read_is_stale_when_processes_use_two_logical_databases_of_one_server(
    database_path: Path, start_server: StartServer
) -> None:
    """As while the number in the URL is changed, process by process."""
    server = start_server(VALKEY)
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(
                open_service(
                    Settings(features=FEATURES, database=database_path, cache_url=f"{server.url}?db={number}"),
                    door="http",
                )
            )
            for number in (0, 1)
        ]
        at = rfc3339(services[0].clock.now_ms() - 1_000)
        for number in range(1, 41):
            raw = {"subject": "signals.tip.served", "event_id": f"e{number}", "user_id": "ada", "tip_id": "t"}
            await services[number % 2].ingestor.ingest([from_queue({**raw, "occurred_at": at}, "event")])
            for service in services:
                for _ in range(3):
                    reading = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
                    assert int(reading.json) == number
