"""Sends requests on pooled connections: `BlockingTransport` for threads, `AsyncioTransport` for an event loop.

A server may close an idle connection at any moment. So a request whose pooled connection breaks is sent again at once
on a new connection. That is safe: every request of this client can be repeated.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from typing import cast

from profiles_client.errors import ConnectionLost, DeadlineExceeded
from profiles_client.wire import Endpoint, Request, Response, ResponseReader

IDLE_S = 60.0  # the service closes a connection after 75
CHUNK = 64 * 1024
MAX_CONNECTIONS = 100
LONGEST_S = 86_400.0  # a socket's timeout must be finite


class _Socket:
    def __init__(self, endpoint: Endpoint, deadline: float) -> None:
        self._reader = ResponseReader()
        self._socket = _connected(endpoint, deadline)
        self.used_at = 0.0

    def exchange(self, data: bytes, deadline: float) -> Response:
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(data)
        while True:
            self._socket.settimeout(_left(deadline))
            response = self._reader.feed(self._socket.recv(CHUNK))
            if response is not None:
                return response

    @property
    def reusable(self) -> bool:
        return self._reader.reusable

    @property
    def silent(self) -> bool:
        """Whether nothing has arrived since the last answer: neither the end of the connection nor stray bytes, which
        would be taken for the next answer."""
        if sys.platform == "win32":
            return not select.select([self._socket], [], [], 0)[0]
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._socket.close()


def _connected(endpoint: Endpoint, deadline: float) -> socket.socket:
    """Connect to the first address that answers."""
    failure: OSError | None = None
    for family, kind, number, _, address in socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, number)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if endpoint.tls is not None:
                connection.settimeout(_left(deadline))  # for the handshake
                return endpoint.tls.wrap_socket(connection, server_hostname=endpoint.host)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure or OSError("the name of the host has no address")


def _left(deadline: float) -> float:
    """The seconds until the deadline, at most `LONGEST_S`. Raises `TimeoutError` if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, LONGEST_S)


class BlockingTransport:
    """Pools connections for threads: a request takes an idle one or opens a new one. The coroutines never suspend."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: deque[_Socket] = deque()
        self._process = os.getpid()
        self._closed = False

    def now(self) -> float:
        return time.monotonic()

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # it runs in no event loop

    async def exchange(self, request: Request, deadline: float) -> Response:
        data = self._endpoint.encoded(request)
        pooled = self._take()
        try:
            if pooled is not None:
                try:
                    return self._on(pooled, data, deadline)
                except TimeoutError:
                    raise
                except (OSError, ConnectionLost):
                    pass
            return self._on(_Socket(self._endpoint, deadline), data, deadline)
        except OSError as error:
            raise _explained(error, self._endpoint, late=time.monotonic() >= deadline) from error

    def _on(self, connection: _Socket, data: bytes, deadline: float) -> Response:
        response: Response | None = None
        try:
            response = connection.exchange(data, deadline)
        finally:
            if response is not None and connection.reusable:
                connection.used_at = time.monotonic()
                self._idle.append(connection)
                with suppress(IndexError):  # those of a past peak, at the left, would never be taken
                    while connection.used_at - self._idle[0].used_at >= IDLE_S:
                        self._idle.popleft().close()
                if self._closed:  # asked after the append: `close` empties the pool after it has set this
                    self._close_idle()
            else:  # also after an exception such as KeyboardInterrupt: a late answer must not meet another request
                connection.close()
        return response

    def _take(self) -> _Socket | None:
        if self._process != os.getpid():  # after a fork, the connections belong to the parent
            self._idle, self._process = deque(), os.getpid()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - connection.used_at < IDLE_S and connection.silent:
                return connection
            connection.close()

    async def close(self) -> None:
        self._closed = True  # calls of other threads close their connections
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):  # not `while self._idle`: other threads take connections, too
            while True:
                self._idle.pop().close()


class _Stream(asyncio.Protocol):
    def __init__(self) -> None:
        self._reader = ResponseReader()
        self._answer: asyncio.Future[Response] | None = None
        self._transport: asyncio.Transport | None = None
        self.open = True
        self.used_at = 0.0

    def send(self, data: bytes, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Response]:
        assert self._transport is not None
        answer = self._answer = loop.create_future()
        self._transport.write(data)
        return answer

    @property
    def reusable(self) -> bool:
        return self.open and self._reader.reusable

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, but is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            response = self._reader.feed(data)
        except ConnectionLost as error:
            self._fail(error)
            return
        if self._answer is None:
            self.close()  # nothing was asked
        elif response is not None:
            answer, self._answer = self._answer, None
            if not answer.done():
                answer.set_result(response)

    def eof_received(self) -> None:
        self.open = False
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None else ""
        self._fail(ConnectionLost(f"the connection broke before the answer{reason}"))

    def _fail(self, error: ConnectionLost) -> None:
        self.close()
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)


class AsyncioTransport:
    """Pools connections for one event loop: the loop that runs when the transport is created."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Stream] = []
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._closed = False

    def now(self) -> float:
        return self._loop.time()

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def exchange(self, request: Request, deadline: float) -> Response:
        data = self._endpoint.encoded(request)
        timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout, self._slots:
                pooled = self._take()
                if pooled is not None:
                    with suppress(ConnectionLost):
                        return await self._on(pooled, data)
                return await self._on(await self._connect(), data)
        except OSError as error:
            # The clock does not tell: uvloop rounds timers to milliseconds, so one may fire before the deadline.
            raise _explained(error, self._endpoint, late=timeout.expired()) from error

    async def _connect(self) -> _Stream:
        there = self._endpoint
        _, stream = await self._loop.create_connection(_Stream, there.host, there.port, ssl=there.tls)
        return stream

    async def _on(self, stream: _Stream, data: bytes) -> Response:
        response: Response | None = None
        try:
            response = await stream.send(data, self._loop)
        finally:
            if response is not None and stream.reusable and not self._closed:
                stream.used_at = self._loop.time()
                self._idle.append(stream)
            else:  # also if this task was cancelled
                stream.close()
        return response

    def _take(self) -> _Stream | None:
        while self._idle:
            stream = self._idle.pop()
            if stream.open and self._loop.time() - stream.used_at < IDLE_S:
                return stream
            stream.close()
        return None

    async def close(self) -> None:
        self._closed = True  # calls of other tasks close their connections
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # the transports close their sockets in the next turn of the loop


def _explained(error: OSError, endpoint: Endpoint, *, late: bool) -> ConnectionLost | DeadlineExceeded:
    if late and isinstance(error, TimeoutError):
        return DeadlineExceeded("no answer before the deadline")
    return ConnectionLost(f"{endpoint.host}:{endpoint.port} cannot be reached: {error}")
