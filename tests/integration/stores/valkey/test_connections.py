"""Connections to the cache, and commands after a change of the server."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from app.errors import CacheUnavailable
from app.profiles.ports import Cell
from app.stores.valkey.connections import Connections
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.stores.valkey.conftest import Connect, OpenCache
from tests.support.pause_points import turn
from tests.support.proxy import proxy
from tests.support.servers import VALKEY, StartServer, ask, calls

CELL = Cell("ann", "f")


async def test_connections_to_one_server_have_its_identity(server: EmbeddedServer, connect: Connect) -> None:
    connections = connect(server.url)
    front, back = await asyncio.gather(connections.get(), connections.get("back"))
    assert front is not back
    assert front.server == back.server == ask(server, "INFO", "server")["run_id"]


async def test_databases_have_different_epochs_on_one_server(server: EmbeddedServer, open_cache: OpenCache) -> None:
    one, same, other = [await open_cache(server, database_id=name) for name in ("one", "one", "other")]
    epoch, _ = await one.read([CELL])
    assert (await same.read([CELL]))[0] == epoch
    assert (await other.read([CELL]))[0] != epoch


async def test_one_connection_is_opened_for_concurrent_callers(server: EmbeddedServer, connect: Connect) -> None:
    connections = connect(server.url)
    before = ask(server, "INFO", "stats")["total_connections_received"]
    found = await asyncio.gather(*(connections.get() for _ in range(20)))
    assert len(set(found)) == 1
    assert ask(server, "INFO", "stats")["total_connections_received"] - before == 2, "ours, and the one of `ask`"


async def test_connection_is_opened_when_the_first_caller_is_cancelled(
    server: EmbeddedServer, connect: Connect
) -> None:
    connections = connect(server.url)
    first = asyncio.get_running_loop().create_task(connections.get())
    await turn()
    second = asyncio.get_running_loop().create_task(connections.get())
    await turn()
    first.cancel()
    assert await (await second).ask([(b"PING",)]) == [b"PONG"]
    assert first.cancelled()


async def test_all_connections_follow_when_the_address_moves(start_server: StartServer, connect: Connect) -> None:
    """The old server still runs. After a DEL on the new one, no read may hit the old one."""
    old, new = start_server(VALKEY), start_server(VALKEY)
    async with proxy(old.socket_path) as moving:
        connections = connect(moving.url)
        front = await connections.get()
        moving.target = new.socket_path
        assert await connections.get() is front, "the move is not known yet"
        back = await connections.get("back")
        assert back.server != front.server
        assert (await connections.get()).server == back.server
        assert front.closed
    old.kill()
    new.kill()


async def test_command_is_not_sent_on_a_closed_connection(server: EmbeddedServer, connect: Connect) -> None:
    connections = connect(server.url)
    before = calls(server, "ping")
    connection = await connections.get()
    connection.close()
    with pytest.raises(CacheUnavailable):
        await connection.ask([(b"PING",)])
    assert calls(server, "ping") == before


async def test_command_fails_when_the_server_was_restarted(own_server: EmbeddedServer, connect: Connect) -> None:
    connections = connect(own_server.url)
    connection = await connections.get()
    own_server.kill()
    own_server.start()
    with pytest.raises(CacheUnavailable):
        await connection.ask([(b"SET", "under the old epoch", "x")])
    assert await (await connections.get()).ask([(b"DBSIZE",)]) == [0]


async def test_reads_continue_when_the_server_was_restarted(own_server: EmbeddedServer, open_cache: OpenCache) -> None:
    cache = await open_cache(own_server)
    first, _ = await cache.read([CELL])
    own_server.kill()
    own_server.start()
    with suppress(CacheUnavailable):  # the end of the old connection may not have been noticed yet
        await cache.read([CELL])
    await cache.open()
    second, _ = await cache.read([CELL])
    assert second != first


@pytest.mark.parametrize(("in_cluster", "missing"), [(False, "run_id"), (True, "master_replid")])
async def test_server_is_unavailable_when_its_identity_is_unknown(
    tmp_path: Path, in_cluster: bool, missing: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"INFO")
        info = b"redis_mode:cluster\r\nrun_id:1" if in_cluster else b"redis_mode:standalone"
        writer.write(b"$%d\r\n%b\r\n" % (len(info), info))
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "socket"):
        connections = Connections(f"unix://{tmp_path}/socket", 5, in_cluster=in_cluster)
        with pytest.raises(CacheUnavailable, match=f"does not report its {missing}"):
            await connections.get()
        await connections.close()
