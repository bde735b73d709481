"""A pipelined connection: many callers share it, commands are sent without waiting, and replies matched in order.

Callers never wait for a free connection. redis-py connects (TLS, password, Sentinel). Then this protocol takes over the
transport, and hiredis parses the replies.

Invariants: a reply resolves the command that it answers, or is dropped. A cancelled command keeps its place in the
order. If a command times out, the connection is closed and every waiting command fails. Nothing is sent on a closed
connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection

from app.errors import CacheRefused, CacheUnavailable

MAX_WAITING = 4_096
# Errors of a server that will answer later; all others refuse the command.
_PASSING = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN", "MOVED", "ASK ")
_LAST_READ_S = 0.001
_INCOMPLETE = object()

# A command as its arguments, or as the bytes to send.
Command = tuple[bytes | str | int, ...] | bytes
Replies = asyncio.Future[list[Any]]
# Makes the commands for some of a call's users, given by their places in the call, under the epoch of their keys.
Commands = Callable[[str, Sequence[int]], Sequence[Command]]

# hiredis declares a tuple of one element, but takes any number.
_pack: Callable[[tuple[bytes | str | int, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


def error_in(reply: object, allowed: tuple[str, ...] = ()) -> CacheUnavailable | None:
    """The error in a reply. None if the reply is no error, or an error whose text begins with one of `allowed`."""
    if not isinstance(reply, hiredis.ReplyError) or (text := str(reply)).startswith(allowed):
        return None
    return CacheUnavailable(text) if text.startswith(_PASSING) else CacheRefused(text)


class PipelinedConnection(asyncio.Protocol):
    """A connection that many callers share. `server` is the server's identity: see `app.stores.valkey.connections`."""

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
        """Send commands. The future resolves to one reply per command; an error reply is a `hiredis.ReplyError`.

        The future raises `CacheUnavailable` on a timeout or when the connection ends.

        Raises:
            CacheUnavailable: the connection is closed; nothing was sent.
            CacheRefused: too many commands are waiting; nothing was sent.
        """
        if self.closed or self._transport.is_closing():
            raise CacheUnavailable("the connection is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise CacheRefused(f"more than {MAX_WAITING} commands are waiting for their replies")
        replies: Replies = self._loop.create_future()
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
            if not replies.done():
                replies.set_exception(CacheUnavailable(reason))
                replies.exception()  # retrieved, because the caller may have been cancelled

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

    def _check_oldest(self) -> None:
        self._watch = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        left = oldest[2] - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._check_oldest)
        else:
            # The reply may be waiting in the socket because this event loop was busy: read it first.
            self._watch = self._loop.call_later(_LAST_READ_S, self._give_up, oldest)

    def _give_up(self, oldest: tuple[Replies, int, float]) -> None:
        self._watch = None
        if self._waiting and self._waiting[0] is oldest:
            self.close(f"no answer within {self._timeout_s * 1000:.0f} ms")
        else:
            self._check_oldest()
