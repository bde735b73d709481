"""One connection shared by many commands: order, refusals, timeouts, and what a server says unasked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import hiredis
import pytest

from app.errors import CacheRefused, CacheUnavailable
from app.stores.valkey.connections import Connections
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.pipelined_connection import MAX_WAITING, PipelinedConnection
from tests.support.proxy import Proxy, proxy
from tests.support.waiting import PATIENCE_S, eventually

TIMEOUT_S = 0.15


@pytest.fixture
async def line(valkey: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with proxy(valkey.socket_path) as opened:
        yield opened


@pytest.fixture
async def connection(line: Proxy) -> AsyncIterator[PipelinedConnection]:
    connections = Connections(line.url, "db", PATIENCE_S)
    yield await connections.get()
    await connections.close()


@pytest.fixture
async def hasty(line: Proxy) -> AsyncIterator[PipelinedConnection]:
    connections = Connections(line.url, "db", TIMEOUT_S)
    yield await connections.get()
    await connections.close()


async def test_every_command_gets_its_own_replies_when_all_are_sent_at_once(connection: PipelinedConnection) -> None:
    asked = [
        connection.ask([(b"ECHO", b"%d.%d" % (number, part)) for part in range(number % 4 + 1)]) for number in range(99)
    ]
    for number, replies in enumerate(await asyncio.gather(*asked)):
        assert replies == [b"%d.%d" % (number, part) for part in range(number % 4 + 1)]


async def test_a_refusal_stands_in_its_place_when_others_succeed(connection: PipelinedConnection) -> None:
    first, second, third = await connection.ask([(b"ECHO", b"1"), (b"NONSENSE",), (b"ECHO", b"3")])
    assert (first, third) == (b"1", b"3")
    assert isinstance(second, hiredis.ReplyError)


async def test_the_connection_closes_and_all_are_told_when_one_command_times_out(
    hasty: PipelinedConnection, line: Proxy
) -> None:
    line.silence()
    waiting = [hasty.ask([(b"ECHO", b"%d" % number)]) for number in range(3)]
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, CacheUnavailable) for outcome in outcomes)
    assert hasty.closed


async def test_no_command_times_out_when_it_was_this_process_that_was_busy(valkey: EmbeddedServer) -> None:
    connections = Connections(valkey.url, "db", TIMEOUT_S)  # no proxy: that would be busy with us
    connection = await connections.get()
    replies = connection.ask([(b"ECHO", b"patience")])
    time.sleep(TIMEOUT_S * 2)  # noqa: ASYNC251  # what is tested: the loop is held up, and the reply lies in the socket
    assert await replies == [b"patience"]
    await connections.close()


async def test_a_late_reply_goes_to_nobody_when_who_asked_was_cancelled(
    connection: PipelinedConnection, line: Proxy
) -> None:
    line.silence()
    cancelled = connection.ask([(b"ECHO", b"cancelled")])
    await eventually(lambda: line.holding)
    cancelled.cancel()
    line.mend()
    assert await connection.ask([(b"ECHO", b"next")]) == [b"next"]


async def test_a_command_is_refused_when_too_many_wait(connection: PipelinedConnection, line: Proxy) -> None:
    line.silence()
    waiting = [connection.ask([(b"PING",)]) for _ in range(MAX_WAITING)]
    with pytest.raises(CacheRefused, match="under way"):
        connection.ask([(b"PING",)])
    line.mend()
    assert all(replies == [b"PONG"] for replies in await asyncio.gather(*waiting))


@pytest.mark.parametrize("noise", [b"+nobody asked\r\n", b"what?\r\n"])
async def test_the_lane_closes_when_the_server_talks_out_of_turn(connection: PipelinedConnection, noise: bytes) -> None:
    connection.data_received(noise)
    assert connection.closed
