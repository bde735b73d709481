"""Clients that send slowly, stop, send too much or do not read are disconnected in bounded time and memory."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic

import psutil  # type: ignore[import-untyped]  # publishes no types
import pytest
import pytest_asyncio

from app import listener
from app.api.middleware import body_limits
from app.api.server import HEAD_BYTES
from tests.support.live import Live
from tests.support.pause_points import turn
from tests.support.site import ServeSite
from tests.support.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.slow

HEAD_S = 0.5
BODY_S = 0.4
HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
KIND = b"Host: localhost\r\nContent-Type: application/json\r\n"
BATCH = b"POST /profiles/batch HTTP/1.1\r\n" + KIND + b"Content-Length: 50\r\n\r\n"
EVENTS = b"POST /events HTTP/1.1\r\n" + KIND + b"Content-Length: 50\r\n\r\n"
CHUNKED = b"POST /events HTTP/1.1\r\n" + KIND + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def brisk(serve_site: ServeSite) -> AsyncIterator[Live]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(body_limits, "BODY_S", BODY_S)
        async with serve_site(head_s=HEAD_S) as served:
            yield served


@asynccontextmanager
async def line(site: Live) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def drip(writer: asyncio.StreamWriter, text: bytes) -> None:
    for place in range(len(text)):
        writer.write(text[place : place + 1])
        await turn(0.05)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """All bytes until the server closes."""
    answer = b""
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            answer = await reader.read()
    return answer


async def test_connection_is_closed_when_nothing_is_sent(brisk: Live) -> None:
    began = monotonic()
    async with line(brisk) as (reader, _):
        assert await until_closed(reader) == b""
    assert monotonic() - began >= HEAD_S


async def test_connection_is_closed_when_its_head_is_slow(brisk: Live) -> None:
    began = monotonic()
    async with line(brisk) as (reader, writer):
        dripping = asyncio.create_task(drip(writer, HEAD + b"X-Slow: " + b"s" * 500))
        answer = await until_closed(reader)
        dripping.cancel()
    assert monotonic() - began >= HEAD_S
    assert b"200" not in answer.split(b"\r\n")[0]


async def test_connection_is_closed_when_it_is_idle(brisk: Live) -> None:
    began = monotonic()
    async with line(brisk) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        answer = await until_closed(reader)
    assert monotonic() - began >= HEAD_S
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_head_is_refused_when_it_is_too_long(brisk: Live) -> None:
    for more in (b"X-Long: " + b"a" * 2 * HEAD_BYTES + b"\r\n", b"X-Many: a\r\n" * 101):
        async with line(brisk) as (reader, writer):
            writer.write(HEAD + more + b"\r\n")
            assert (await until_closed(reader)).startswith(b"HTTP/1.1 431 ")
    async with line(brisk) as (reader, writer):
        writer.write(HEAD + (b"X-Long: " + b"a" * 8_000 + b"\r\n") * 4 + b"X-Many: a\r\n" * 90 + b"\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("request_head", [BATCH, EVENTS, CHUNKED])
@pytest.mark.parametrize("how", ["nothing", "slowly"])
async def test_request_times_out_when_its_body_is_incomplete(brisk: Live, request_head: bytes, how: str) -> None:
    text = b" " * 49 if request_head is not CHUNKED else b"1\r\n \r\n" * 30
    began = monotonic()
    async with line(brisk) as (reader, writer):
        writer.write(request_head)
        dripping = asyncio.create_task(drip(writer, text if how == "slowly" else b""))
        answer = await until_closed(reader)
        dripping.cancel()
    assert monotonic() - began >= BODY_S
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert b"application/problem+json" in answer
    assert b"\r\nconnection: close\r\n" in answer.lower()


async def test_body_is_read_when_it_is_sent_in_parts(brisk: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BODY_S", PATIENCE_S)
    text = b'{"user_ids":["u"]}'.ljust(50)
    async with line(brisk) as (reader, writer):
        writer.write(BATCH + text[:20])
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(text[20:])
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")


async def test_other_requests_are_answered_when_many_senders_hang(brisk: Live) -> None:
    stuck = [socket.create_connection(("127.0.0.1", brisk.port)) for _ in range(300)]
    try:
        for place, connection in enumerate(stuck):
            connection.sendall((HEAD, BATCH, EVENTS + b" ")[place % 3])
        # On connections of their own: the server closes an idle one of the client's pool after `HEAD_S`.
        for path in (b"/profiles/u", b"/healthz"):
            async with line(brisk) as (reader, writer):
                writer.write(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
                assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in stuck:
            connection.close()


@pytest.mark.slow
async def test_connection_is_closed_when_the_client_does_not_read(
    serve_site: ServeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "UNTAKEN_S", 1)
    target = b"GET /schema/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with serve_site() as site:
        size = len((await site.client.get("/schema/assets/swagger-ui-bundle.js")).content)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", site.port))
            await loop.sock_sendall(connection, target)
            await _dropped(connection)
            taken = 0
            try:
                while part := await asyncio.wait_for(loop.sock_recv(connection, 65_536), PATIENCE_S):
                    taken += len(part)
            except ConnectionError:
                pass
    assert taken < size


async def _dropped(connection: socket.socket) -> None:
    """Return when the peer has closed a connection, without reading from it."""
    # Both addresses, because another program's connection to another server may have the same client address.
    ends = connection.getpeername(), connection.getsockname()

    def is_open() -> bool:
        connections = psutil.net_connections("tcp")
        return any((one.laddr, one.raddr) == ends and one.status == "ESTABLISHED" for one in connections)

    await eventually(lambda: not is_open())
