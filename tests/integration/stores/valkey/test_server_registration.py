"""All processes use the registered server as the cache, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import app.bootstrap.servers
from app.bootstrap.service import OpenService, open_service
from app.errors import CacheRefused
from app.features.clock import Clock
from app.profiles.ports import ObservedState
from app.settings import Settings
from app.stores.sql.cache_state import register_server
from app.stores.sqlite.database import SqliteDatabase
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.registration import HOLD_BACK_S, InMemoryState, ServerRegistration
from tests.support.clock import FakeClock
from tests.support.events import served
from tests.support.proxy import Proxy, proxy
from tests.support.registry import FEATURES
from tests.support.servers import VALKEY, StartServer
from tests.support.waiting import PATIENCE_S, eventually

VOLUME = 4


class Processes:
    """Several processes that share a database. Each reaches the cache at its own URL."""

    def __init__(self, services: Sequence[OpenService]) -> None:
        self.services = services
        self.sent = 0

    async def ingest(self, service: OpenService) -> bool:
        """Ingest the next event. Return whether the keys were deleted."""
        self.sent += 1
        at_ms = service.clock.now_ms() - 1_000
        return (await service.ingestor.ingest([served("ada", at_ms, event_id=f"e{self.sent}")])).invalidated


async def volume(service: OpenService) -> tuple[int, bool]:
    """The number of ingested events as this process reads it, and whether it was a hit."""
    reading = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
    return int(reading.json), reading.cached


async def until_hit(service: OpenService) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not (await volume(service))[1]:
            pass


@asynccontextmanager
async def processes(database_path: Path, urls: Sequence[str]) -> AsyncIterator[Processes]:
    async with AsyncExitStack() as stack:
        settings = [
            Settings(features=FEATURES, database=database_path, cache_url=url, cache_timeout_ms=5_000) for url in urls
        ]
        yield Processes([await stack.enter_async_context(open_service(item, door="http")) for item in settings])


@asynccontextmanager
async def two_processes(database_path: Path, server: EmbeddedServer) -> AsyncIterator[tuple[Processes, Proxy, Proxy]]:
    async with (
        proxy(server.socket_path) as first,
        proxy(server.socket_path) as second,
        processes(database_path, [first.url, second.url]) as opened,
    ):
        yield opened, first, second


async def move(way: Proxy, server: EmbeddedServer) -> None:
    """Break the connections through a proxy. New ones reach `server`."""
    way.target = server.socket_path
    way.cut()
    way.mend()


@pytest.mark.slow
async def test_read_is_right_when_another_process_deletes_on_another_server(
    database_path: Path, start_server: StartServer
) -> None:
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with two_processes(database_path, old) as (both, first_proxy, second_proxy):
        first, second = both.services
        await both.ingest(first)
        await until_hit(second)
        await move(first_proxy, new)
        assert not await both.ingest(first)
        assert await volume(second) == (2, False)
        await move(second_proxy, new)
        await until_hit(second)
        assert await volume(second) == (2, True)
        assert await both.ingest(first)
        assert (await volume(second))[0] == 3


@pytest.mark.slow
async def test_read_is_stale_without_the_registration(
    database_path: Path, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: if each process registers for itself, the reader hits old values on the old server."""

    def alone(state: ObservedState, _: object, clock: Clock) -> ServerRegistration:
        own = InMemoryState(state.last.database_id)
        return ServerRegistration(own, own.store, clock)

    monkeypatch.setattr(app.bootstrap.servers, "ServerRegistration", alone)
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with two_processes(database_path, old) as (both, first_proxy, _):
        first, second = both.services
        await both.ingest(first)
        await until_hit(second)
        await move(first_proxy, new)
        stale = False
        async with asyncio.timeout(PATIENCE_S):
            while not stale:
                await both.ingest(first)
                value, cached = await volume(second)
                stale = cached and value < both.sent


@pytest.mark.slow
async def test_old_contents_are_not_read_when_a_server_returns(database_path: Path, start_server: StartServer) -> None:
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with two_processes(database_path, old) as (both, *proxies):
        first, second = both.services
        await both.ingest(first)
        await until_hit(first)
        for server in (new, old, new, old):
            for way in proxies:
                await move(way, server)
            await both.ingest(first)
            for service in (first, second):
                assert (await volume(service))[0] == both.sent
            await until_hit(first)
            assert (await volume(second))[0] == both.sent


@pytest.mark.slow
async def test_no_read_is_stale_when_processes_use_two_logical_databases(
    database_path: Path, start_server: StartServer
) -> None:
    """This is the case while the number in the URL is changed, process by process."""
    server = start_server(VALKEY)
    async with processes(database_path, [f"{server.url}?db={number}" for number in (0, 1)]) as both:
        for number in range(1, 41):
            await both.ingest(both.services[number % 2])
            for service in both.services:
                for _ in range(3):
                    assert (await volume(service))[0] == number


def registration_in(database: SqliteDatabase, clock: FakeClock, **options: Any) -> ServerRegistration:
    return ServerRegistration(database.state, partial(register_server, database), clock, **options)


async def test_one_of_two_wins_when_both_register(database: SqliteDatabase) -> None:
    clock = FakeClock()
    first, second = registration_in(database, clock), registration_in(database, clock)
    await first.revise(lambda _: "a" * 40)
    await register_server(database, "b" * 40, 0)  # after generation 0, but there is a generation 1
    await second.revise(lambda _: "a" * 40)
    state = await database.state.query()
    assert (state.server, state.generation) == ("a" * 40, 1)
    assert first.require("a" * 40) == second.require("a" * 40) == state


async def test_unregistered_server_is_refused_and_then_registered(database: SqliteDatabase) -> None:
    registration = registration_in(database, FakeClock())
    await registration.revise(lambda _: "a" * 40)
    with pytest.raises(CacheRefused):
        registration.require("b" * 40)
    await eventually(lambda: database.state.last.server == "b" * 40)
    assert registration.require("b" * 40).generation == 2
    await registration.close()


async def test_settle_waits_until_older_queries_have_expired(database: SqliteDatabase) -> None:
    clock = FakeClock()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        clock.advance(int(seconds * 1000))

    registration = registration_in(database, clock, pause=pause)
    await registration.revise(lambda _: "a" * 40)
    clock.advance(30)
    await registration.settle()
    await registration.settle()
    assert pauses == [pytest.approx(HOLD_BACK_S - 0.03)]
