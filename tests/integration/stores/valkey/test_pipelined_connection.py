"""A shared connection: the order of replies, refusals, timeouts, and unexpected replies."""

import asyncio

import hiredis
import pytest

from app.errors import CacheRefused, CacheUnavailable
from app.stores.valkey.connections import MAX_WAITING, PipelinedConnection
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.stores.valkey.conftest import Connect
from tests.support.proxy import Proxy
from tests.support.servers import ask, calls
from tests.support.waiting import PATIENCE_S, eventually, eventually_sync

TIMEOUT_S = 1.0


@pytest.fixture
async def connection(valkey_proxy: Proxy, connect: Connect) -> PipelinedConnection:
    return await connect(valkey_proxy.url, timeout_s=PATIENCE_S).get()


async def test_commands_get_their_own_replies_when_sent_at_once(connection: PipelinedConnection) -> None:
    asked = [
        connection.ask([(b"ECHO", b"%d.%d" % (number, part)) for part in range(number % 4 + 1)]) for number in range(99)
    ]
    for number, replies in enumerate(await asyncio.gather(*asked)):
        assert replies == [b"%d.%d" % (number, part) for part in range(number % 4 + 1)]


async def test_error_reply_stands_in_its_place(connection: PipelinedConnection) -> None:
    first, second, third = await connection.ask([(b"ECHO", b"1"), (b"NONSENSE",), (b"ECHO", b"3")])
    assert (first, third) == (b"1", b"3")
    assert isinstance(second, hiredis.ReplyError)


@pytest.mark.slow
async def test_all_commands_fail_when_one_times_out(valkey_proxy: Proxy, connect: Connect) -> None:
    connection = await connect(valkey_proxy.url, timeout_s=TIMEOUT_S).get()
    valkey_proxy.silence()
    waiting = [connection.ask([(b"ECHO", b"%d" % number)]) for number in range(3)]
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, CacheUnavailable) for outcome in outcomes)
    assert connection.closed


@pytest.mark.slow
async def test_command_survives_a_blocked_event_loop(valkey: EmbeddedServer, connect: Connect) -> None:
    connection = await connect(valkey.url, timeout_s=TIMEOUT_S).get()  # no proxy: it runs on the blocked loop
    ask(valkey, "CONFIG", "RESETSTAT")
    replies, loop = connection.ask([(b"ECHO", b"patience")]), asyncio.get_running_loop()
    late = loop.time() + TIMEOUT_S
    eventually_sync(lambda: calls(valkey, "echo") and loop.time() > late)  # the loop is blocked meanwhile
    assert await replies == [b"patience"]


async def test_late_reply_of_a_cancelled_command_is_dropped(
    connection: PipelinedConnection, valkey_proxy: Proxy
) -> None:
    valkey_proxy.silence()
    cancelled = connection.ask([(b"ECHO", b"cancelled")])
    await eventually(lambda: valkey_proxy.holding)
    cancelled.cancel()
    valkey_proxy.mend()
    assert await connection.ask([(b"ECHO", b"next")]) == [b"next"]


async def test_command_is_refused_when_too_many_wait(connection: PipelinedConnection, valkey_proxy: Proxy) -> None:
    valkey_proxy.silence()
    waiting = [connection.ask([(b"PING",)]) for _ in range(MAX_WAITING)]
    with pytest.raises(CacheRefused, match="waiting"):
        await connection.ask([(b"PING",)])
    valkey_proxy.mend()
    assert all(replies == [b"PONG"] for replies in await asyncio.gather(*waiting))


@pytest.mark.parametrize("noise", [b"+unexpected\r\n", b"what?\r\n"])
async def test_connection_closes_on_an_unexpected_reply(connection: PipelinedConnection, noise: bytes) -> None:
    connection.data_received(noise)
    assert connection.closed
