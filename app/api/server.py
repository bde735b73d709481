"""Serving an ASGI application with granian, in this process and event loop, until a signal comes.

Invariants: `listen` returns within the drain and `STOP_GRACE_S`, whatever clients do. A client that was let in is
answered: the socket is closed only when its accept queue is empty and stays empty, and until then each answer
tells its connection to close, so that no client sends its next request to a process that is gone.
What granian cannot end, the system does: a peer that takes nothing, or is gone, is dropped after `UNTAKEN_S`.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.net import SocketHolder  # type: ignore[attr-defined]  # it stands there, but is not marked as public
from granian.server.embed import Server
from litestar import Litestar
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import SettingsError
from app.telemetry import logger

BACKLOG = 1024
# Connections at once; the next ones wait in the backlog. More than requests that are let in at once (the gateway sheds
# those), so that a probe or an admin gets in while clients hold connections that they do not use.
CONNECTIONS = 4096
FILES_LEFT = 128  # for the database, the cache, the log
# From the connection's beginning, or the last answer, to the end of a head: slow senders, and idle connections.
KEEP_ALIVE_S = 75
HEAD_BYTES = 64 * 1024  # twice as long a head is answered 431 for certain, as are more than 100 headers
UNTAKEN_S = 30  # bytes that the peer does not acknowledge, or has no room for
# After the drain: when what still computes is interrupted, and when connections are cut; closing has half a second.
OVERDUE_S = 3.0
STOP_GRACE_S = 4.5
# After the signal: until no request has begun for so long, but no longer than that.
QUIET_S = 0.1
LINGER_S = 1.0
QUEUE_STEPS, QUEUE_STEP_S = 250, 0.002
_SO_ATTACH_FILTER = 26
_TCP_INFO_UNACKED = 24  # the offset of a field that tells, of a listening socket, how many wait to be accepted
log = logger("api")


async def listen(
    application: Litestar,
    host: str,
    port: int,
    on_stop: Callable[[], None] = lambda: None,
    on_overdue: Callable[[], None] = lambda: None,
    *,
    drain_s: float = 0,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> None:
    """Serve until SIGTERM or SIGINT; `on_stop` is told of it first, and ends what would never end by itself.

    `on_overdue` is called when requests still run `OVERDUE_S` after the drain: it makes them answer that they were cut.

    For `drain_s` after the signal everything is served as before: until balancers have seen that we are not ready. A
    connection that sends no whole head for `keep_alive_s` is closed.

    Raises:
        SettingsError: the system refuses the host or the port.
    """
    try:
        with listening_socket(host, port) as door:
            await _until_stopped(
                application, GranianServer(application, door, head_s=keep_alive_s), door, on_stop, on_overdue, drain_s
            )
    except OSError as error:
        raise SettingsError("PROFILES_PORT", f"cannot serve on {host}:{port}: {error.strerror or error}") from None


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to from now on. Raises `OSError`."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    door = socket.socket(family, kind, protocol)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            # A successor may listen before its predecessor has gone.
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Every connection has these from its listener.
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNTAKEN_S * 1000)
        door.bind(address)
        door.listen(BACKLOG)
    except BaseException:
        door.close()
        raise
    return door


_holder: Any = SocketHolder  # its type leaves out the arguments


class GranianServer(Server):
    """granian's, on a socket of ours. It has an end of its own, which it closes."""

    def __init__(self, application: ASGIApp, door: socket.socket, *, head_s: float = KEEP_ALIVE_S) -> None:
        super().__init__(
            application,
            interface=Interfaces.ASGI,
            http=HTTPModes.http1,
            websockets=False,
            backlog=BACKLOG,
            backpressure=connections(),
            http1_settings=HTTP1Settings(header_read_timeout=int(head_s * 1000), max_buffer_size=HEAD_BYTES),
            log_enabled=False,
        )
        self._door = door

    def _init_shared_socket(self) -> None:
        self._shd = _holder(self._door.dup().detach(), False, BACKLOG)


def connections() -> int:
    """How many connections the system lets this process have, but not more than is good for it."""
    if sys.platform == "win32":
        return CONNECTIONS
    import resource  # noqa: PLC0415  # not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + FILES_LEFT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            soft_at_best = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft_at_best, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(FILES_LEFT, min(CONNECTIONS, soft - FILES_LEFT))


class LastAnswers:
    """ASGI, around an application that is about to stop: after each answer its connection closes."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner
        self._begun = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._begun += 1

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._inner(scope, receive, send_last)

    async def quiet(self) -> None:
        """Return when no request has begun for a while, but after some time in any case."""
        loop = asyncio.get_running_loop()
        until, seen = loop.time() + LINGER_S, -1
        while seen != self._begun and loop.time() < until:
            seen = self._begun
            await asyncio.sleep(QUIET_S)


async def _until_stopped(
    application: Litestar,
    server: Server,
    door: socket.socket,
    on_stop: Callable[[], None],
    on_overdue: Callable[[], None],
    drain_s: float,
) -> None:
    """granian waits for the last request however long it takes: for a sender that stalled in its body, for ever."""
    loop = asyncio.get_running_loop()
    serving = loop.create_task(server.serve())
    stopping: list[asyncio.Task[None] | asyncio.TimerHandle] = []

    def stop() -> None:
        if not stopping:
            on_stop()
            stopping.append(loop.call_later(drain_s + OVERDUE_S, on_overdue))
            loop.call_later(drain_s + STOP_GRACE_S, serving.cancel)
            stopping.append(loop.create_task(_wind_down(application, door, server, drain_s)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await asyncio.wait({serving})
    for ending in stopping:
        ending.cancel()
    if serving.cancelled():
        log.warning("requests_cut_short", after_s=STOP_GRACE_S)
    else:
        serving.result()


async def _wind_down(application: Litestar, door: socket.socket, server: Server, drain_s: float) -> None:
    """Stop in three steps after the drain, so that no request that was sent is lost.

    1. Serve on, and have every connection close after its next answer. Otherwise: the client sends its next request;
       we close the connection; the client sees a reset and cannot know whether it was carried out.
    2. Let nobody in any more, and wait until whoever is in the queue has been taken, and has sent. Otherwise: a client
       connects and sends; we close the socket, and with it its queue, or the connection from which nothing has been
       read yet; the client sees a reset.
    3. Close the socket: clients are refused, and turn elsewhere. Those dropped in step 2 try again after a second.
    """
    await asyncio.sleep(drain_s)
    last = LastAnswers(application.asgi_handler)
    application.asgi_handler = last
    await last.quiet()
    if _let_nobody_in(door):
        for _ in range(QUEUE_STEPS):
            if not _queued(door):
                break
            await asyncio.sleep(QUEUE_STEP_S)
        await last.quiet()
    door.close()
    server.stop()  # type: ignore[no-untyped-call]  # granian's, which has no types


def _let_nobody_in(door: socket.socket) -> bool:
    """Drop whatever comes to a listening socket, those who are in excepted; False where the system cannot do that."""
    if sys.platform != "linux":
        return False
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction: return 0, keep nothing
    try:
        door.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop)))
    except OSError:
        return False
    return True


def _queued(door: socket.socket) -> int:
    """How many are connected and wait to be accepted (Linux)."""
    found = door.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_UNACKED + 4)
    (queued,) = struct.unpack_from("I", found, _TCP_INFO_UNACKED)
    return int(queued)
