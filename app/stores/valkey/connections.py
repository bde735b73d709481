"""Connections to a cache server, which many callers share: commands are sent without waiting for replies.

Invariants of a connection: a reply resolves the command that it answers, or is dropped. A cancelled command keeps its
place in the order. If a command times out, the connection is closed and every waiting command fails. Nothing is sent on
a closed connection.

Each connection learns the server's identity before its first command: its `run_id`, which changes with every start, and
the number of the logical database. For a node of a cluster, the identity is its `run_id` and its replication id, which
changes when the node becomes a master.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from app.concurrency.tasks import end, fail
from app.errors import CacheRefused, CacheUnavailable
from app.stores.valkey.pool import AWAY, IS_CLUSTER, IS_NO_CLUSTER, blocking_pool, public_reason

MAX_WAITING = 4_096
_MOVES = 3
_fields = re.compile(r"(\w+):([^\r\n]*)").findall
# Errors of a server that will answer later; all others refuse the command.
_PASSING = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN", "MOVED", "ASK ")
_LAST_READ_S = 0.001
_INCOMPLETE = object()
# A command as its arguments, or as the bytes to send.
Command = tuple[bytes | str | int, ...] | bytes
Replies = asyncio.Future[list[Any]]
# Makes commands from the epoch of their keys and from the users that they are for: indices into the users of a call.
Commands = Callable[[str, Sequence[int]], Sequence[Command]]
# The connection for commands that requests wait for, and the one for storing values and for bulk work.
Use = Literal["front", "back"]
# hiredis declares a tuple of one element, but takes any number.
_pack: Callable[[tuple[bytes | str | int, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


def error_in(reply: object, allowed: tuple[str, ...] = ()) -> CacheUnavailable | None:
    """The error in a reply. None if the reply is no error, or an error whose text begins with one of `allowed`."""
    if not isinstance(reply, hiredis.ReplyError) or (text := str(reply)).startswith(allowed):
        return None
    return CacheUnavailable(text) if text.startswith(_PASSING) else CacheRefused(text)


class PipelinedConnection(asyncio.Protocol):
    """A connection that many callers share. redis-py has opened it. `server`: the identity of the server."""

    def __init__(self, connection: AbstractConnection, server: str, timeout_s: float) -> None:
        """Take over an established connection without outstanding replies. `timeout_s` limits the wait for a reply."""
        self.server = server
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._waiting: deque[tuple[Replies, int, float]] = deque()
        self._replies: list[Any] = []
        self._watch: asyncio.TimerHandle | None = None
        self._connection = connection
        writer: Any = connection._writer  # noqa: SLF001  # redis-py has no public access to it
        self._transport: asyncio.Transport = writer.transport
        self._transport.set_protocol(self)

    def ask(self, commands: Sequence[Command]) -> Replies:
        """Send commands. The future resolves to one reply per command; an error reply is a `hiredis.ReplyError`. The
        future raises `CacheUnavailable` on a timeout or if the connection is closed. If too many commands are waiting,
        nothing is sent, and the future raises `CacheRefused`."""
        replies: Replies = self._loop.create_future()
        full = len(self._waiting) >= MAX_WAITING
        if full or self.closed or self._transport.is_closing():
            refusal = CacheRefused(f"more than {MAX_WAITING} commands are waiting for their replies")
            fail(replies, refusal if full else CacheUnavailable("the connection is closed"))
            return replies
        self._waiting.append((replies, len(commands), self._loop.time() + self._timeout_s))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._check_oldest)
        packed = [command if isinstance(command, bytes) else _pack(command) for command in commands]
        self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        return replies

    def close(self, reason: str = "the connection was closed") -> None:
        """Close the connection, and fail every waiting command."""
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._transport.abort()
        # The transport is ours; without a stream, redis-py neither closes it nor warns.
        self._connection._reader = self._connection._writer = None  # noqa: SLF001
        waiting, self._waiting = self._waiting, deque()
        for replies, _, _ in waiting:
            fail(replies, CacheUnavailable(reason))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._replies.append(reply)
                if not self._waiting:
                    self.close("the server sent a reply without a command")
                    return
                replies, count, _ = self._waiting[0]
                if len(self._replies) == count:
                    self._waiting.popleft()
                    answer, self._replies = self._replies, []
                    if not replies.done():
                        replies.set_result(answer)
        except hiredis.ProtocolError as error:
            self.close(f"the server does not speak the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"the connection ended: {exc or 'closed by the server'}")

    def _check_oldest(self, late: object = None) -> None:
        """Close the connection if its oldest waiting command is `late`: the command that had timed out at the last
        check and still waits. If the oldest command has timed out since, check again after `_LAST_READ_S` seconds, in
        which its reply may be read. If it has not, check again when it times out."""
        self._watch = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        left = oldest[2] - self._loop.time()
        if oldest is late:
            self.close(f"no answer within {self._timeout_s * 1000:.0f} ms")
        elif left > 0:
            self._watch = self._loop.call_later(left, self._check_oldest)
        else:
            # The reply may be waiting in the socket because this event loop was busy: read it first.
            self._watch = self._loop.call_later(_LAST_READ_S, self._check_oldest, oldest)


class Connections:
    """The connections of a process to its cache, or to a node of a cluster, opened on first use. There are two, so that
    the commands of requests never wait behind a thousand writes of computed values."""

    def __init__(self, url: str, timeout_s: float, *, in_cluster: bool = False) -> None:
        self._in_cluster = in_cluster
        self._timeout_s = timeout_s
        self._newest = ""
        self._connections: dict[Use, PipelinedConnection] = {}
        self._opening: dict[Use, asyncio.Task[None]] = {}
        # Used only to make connections, because it handles TLS, passwords and Sentinel.
        self._pool: Any = blocking_pool(url, timeout_s, 2)

    async def get(self, use: Use = "front") -> PipelinedConnection:
        """The open connection for `use`, which is opened if `ready` returns None. Raises `CacheUnavailable`."""
        # 1. One connection reaches server S; 2. the address moves to T while S still runs; 3. the other connection
        # reaches T and sends a DEL; 4. a read on the first would hit the old value on S. So both use the newest server.
        for _ in range(_MOVES):
            if (connection := self.ready(use)) is not None:
                return connection
            opening = self._opening.get(use)
            if opening is None or opening.done():
                opening = self._opening[use] = asyncio.get_running_loop().create_task(self._open(use))
                # Its error is retrieved, because all waiters may have been cancelled.
                opening.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shielded: a cancelled caller must not cancel the connection of other callers. The loop checks again,
            # because the other connection may have reached another server meanwhile.
            await asyncio.shield(opening)
        raise CacheUnavailable("the connection was lost again and again")

    def ready(self, use: Use) -> PipelinedConnection | None:
        """The connection for `use`. None if it is not open, or if the other connection was opened later and reached
        another server, for example after a failover."""
        connection = self._connections.get(use)
        usable = connection is not None and not connection.closed and connection.server == self._newest
        return connection if usable else None

    async def close(self) -> None:
        await end(list(self._opening.values()))
        for connection in self._connections.values():
            connection.close()
        await self._pool.aclose()

    async def _open(self, use: Use) -> None:
        if (before := self._connections.pop(use, None)) is not None:
            before.close("the cache has moved to another server")
        link: AbstractConnection = self._pool.make_connection()
        try:
            await link.connect()  # type: ignore[no-untyped-call]  # as redis-py left it
            self._newest = await self._identity(link)
        except BaseException as error:
            await link.disconnect(nowait=True)
            if isinstance(error, (*AWAY, EOFError)):
                raise CacheUnavailable(f"{type(error).__name__}: {error}", public_reason(error)) from error
            raise
        self._connections[use] = PipelinedConnection(link, self._newest, self._timeout_s)

    async def _identity(self, link: AbstractConnection) -> str:
        await link.send_command("INFO", "server", *(["replication"] if self._in_cluster else []))
        reply = await link.read_response()
        info = dict(_fields(reply.decode(errors="replace"))) if isinstance(reply, bytes) else {}
        for name in ("run_id", "master_replid") if self._in_cluster else ("run_id",):
            if name not in info:
                raise RedisConnectionError(f"the server does not report its {name}")
        if ("cluster" in (info.get("redis_mode"), info.get("server_mode"))) != self._in_cluster:
            raise RedisConnectionError(IS_NO_CLUSTER if self._in_cluster else IS_CLUSTER)
        run_id = info["run_id"]
        if self._in_cluster:
            return f"{run_id}:{info['master_replid']}"
        # Each logical database is a separate cache: a DEL in one does not reach another. In database 0 the identity
        # is the bare run_id, as older releases register it.
        return f"{run_id}/{link.db}" if link.db else run_id
