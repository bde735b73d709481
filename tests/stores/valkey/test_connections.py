"""Connections and their epochs: what happens to commands when the server at the other end is another one."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import CacheUnavailable
from app.profiles.ports import Cell, Epoch
from app.stores.valkey.connections import Connections, converse
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.caches import valkey_cache
from tests.support.proxy import proxy
from tests.support.servers import VALKEY, StartServer, calls

CELL = Cell("ann", "f")


async def epochs(connections: Connections, many: int) -> list[Epoch]:
    """The epochs of `many` connections that are borrowed at the same time."""
    everybody_in = asyncio.Barrier(many)

    async def one() -> Epoch:
        async with connections.borrow() as (_, epoch):
            await everybody_in.wait()
            return epoch

    return await asyncio.gather(*(one() for _ in range(many)))


async def test_connections_share_an_epoch_when_the_server_is_the_same(server: EmbeddedServer) -> None:
    here, there = Connections(server.url, "db", 5), Connections(server.url, "another", 5)
    assert len(set(await epochs(here, 4))) == 1
    assert set(await epochs(here, 1)).isdisjoint(await epochs(there, 1))
    await here.close()
    await there.close()


async def test_all_connections_follow_when_the_address_moves_to_another_server(start_server: StartServer) -> None:
    """The old server lives on, and so do connections to it: a DEL on the new one must not leave them hits."""
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with proxy(old.socket_path) as line:
        connections = Connections(line.url, "db", 5)
        (before,) = set(await epochs(connections, 2))
        line.target = new.socket_path
        assert set(await epochs(connections, 2)) == {before}, "nobody can know yet"
        (_, _, after) = await epochs(connections, 3)  # one more than there are
        assert after != before
        assert set(await epochs(connections, 3)) == {after}
        await connections.close()
    old.kill()
    new.kill()


async def test_a_command_is_not_sent_when_its_connection_closed_after_it_was_borrowed(server: EmbeddedServer) -> None:
    connections = Connections(server.url, "db", 5)
    before = calls(server, "ping")

    async def ping_on_a_closed_connection() -> None:
        async with connections.borrow() as (connection, _):
            await connection.disconnect(nowait=True)
            await converse(connection, [(b"PING",)])

    with pytest.raises(CacheUnavailable):
        await ping_on_a_closed_connection()
    assert calls(server, "ping") == before
    await connections.close()


async def test_a_command_fails_when_the_server_restarts_after_its_connection_was_borrowed(
    own_server: EmbeddedServer,
) -> None:
    connections = Connections(own_server.url, "db", 5)

    async def set_after_a_restart() -> None:
        async with connections.borrow() as (connection, _):
            own_server.kill()
            own_server.start()
            await converse(connection, [(b"SET", "under the old epoch", "x")])

    with pytest.raises(CacheUnavailable):
        await set_after_a_restart()
    async with connections.borrow() as (connection, _):
        assert await converse(connection, [(b"DBSIZE",)]) == [0]
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
