"""Lanes and their epochs: what happens to commands when the server at the other end is another one."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import CacheUnavailable
from app.profiles.ports import Cell
from app.stores.valkey.connections import Connections, Use
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.caches import valkey_cache
from tests.support.gates import turn
from tests.support.proxy import proxy
from tests.support.servers import VALKEY, StartServer, ask, calls

CELL = Cell("ann", "f")


async def test_lanes_share_an_epoch_when_the_server_is_the_same(server: EmbeddedServer) -> None:
    here, there = Connections(server.url, "db", 5), Connections(server.url, "another", 5)
    front, back = await asyncio.gather(here.get(), here.get(Use.BACK))
    assert front is not back
    assert here.epoch(front) == here.epoch(back) != there.epoch(await there.get())
    await here.close()
    await there.close()


async def test_one_lane_is_opened_when_many_want_it_at_once(server: EmbeddedServer) -> None:
    connections = Connections(server.url, "db", 5)
    before = ask(server, "INFO", "stats")["total_connections_received"]
    found = await asyncio.gather(*(connections.get() for _ in range(20)))
    assert len(set(found)) == 1
    assert ask(server, "INFO", "stats")["total_connections_received"] - before == 2, "ours, and the one that asks"
    await connections.close()


async def test_a_lane_is_opened_for_the_others_when_who_wanted_it_first_is_cancelled(server: EmbeddedServer) -> None:
    connections = Connections(server.url, "db", 5)
    first = asyncio.get_running_loop().create_task(connections.get())
    await turn()
    second = asyncio.get_running_loop().create_task(connections.get())
    await turn()
    first.cancel()
    assert await (await second).ask([(b"PING",)]) == [b"PONG"]
    assert first.cancelled()
    await connections.close()


async def test_all_lanes_follow_when_the_address_moves_to_another_server(start_server: StartServer) -> None:
    """The old server lives on, and so does the connection to it: a DEL on the new one must not leave it hits."""
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with proxy(old.socket_path) as line:
        connections = Connections(line.url, "db", 5)
        front = await connections.get()
        before = connections.epoch(front)
        line.target = new.socket_path
        assert await connections.get() is front, "nobody can know yet"
        after = connections.epoch(await connections.get(Use.BACK))
        assert after != before
        assert connections.epoch(await connections.get()) == after
        assert front.closed
        await connections.close()
    old.kill()
    new.kill()


async def test_a_command_is_not_sent_when_its_lane_closed_meanwhile(server: EmbeddedServer) -> None:
    connections = Connections(server.url, "db", 5)
    before = calls(server, "ping")
    connection = await connections.get()
    connection.close()
    with pytest.raises(CacheUnavailable):
        connection.ask([(b"PING",)])
    assert calls(server, "ping") == before
    await connections.close()


async def test_a_command_fails_when_the_server_restarts_after_its_lane_was_opened(own_server: EmbeddedServer) -> None:
    connections = Connections(own_server.url, "db", 5)
    connection = await connections.get()
    own_server.kill()
    own_server.start()
    with pytest.raises(CacheUnavailable):
        await connection.ask([(b"SET", "under the old epoch", "x")])
    assert await (await connections.get()).ask([(b"DBSIZE",)]) == [0]
    await connections.close()


async def test_reads_go_on_at_once_when_the_server_was_restarted(own_server: EmbeddedServer) -> None:
    cache = valkey_cache(own_server)
    first, _ = await cache.read([CELL])
    own_server.kill()
    own_server.start()
    try:
        second, _ = await cache.read([CELL])
    except CacheUnavailable:  # the end of the old connection was not seen yet; once is enough
        second, _ = await cache.read([CELL])
    assert second != first
    await cache.close()
