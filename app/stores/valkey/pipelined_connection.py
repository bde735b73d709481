"""A lane: one connection that many commands share, each written at once, their replies matched in order.

Nobody waits for a connection, and commands of one tick of the event loop travel in one write. redis-py connects (TLS,
password, Sentinel) and hands the established transport over; from then on the lane is its protocol, and hiredis reads
the replies.
Invariants: a reply reaches the command it answers, or nobody: whoever was cancelled leaves its place in the row, and a
lane on which one command timed out is closed, with everything that still waits on it. Nothing is sent on a closed lane.
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
_LAST_LOOK_S = 0.001
_INCOMPLETE = object()

Command = tuple[bytes | str | int, ...]
Replies = asyncio.Future[list[Any]]

# hiredis declares a tuple of one element where it takes any number.
_pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]


class PipelinedConnection(asyncio.Protocol):
    """One per use of a server. `server` is the `run_id` that it was greeted with."""

    def __init__(self, connection: AbstractConnection, server: str, timeout_s: float) -> None:
        """Take over an established connection whose last reply was read."""
        self.server = server
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._waiting: deque[tuple[Replies, int, float]] = deque()
        self._replies: list[Any] = []
        self._watch: asyncio.TimerHandle | None = None
        self._connection = connection
        writer: Any = connection._writer  # noqa: SLF001  # redis-py has no public way to it
        self._transport: asyncio.Transport = writer.transport
        self._transport.set_protocol(self)

    def ask(self, commands: Sequence[Command]) -> Replies:
        """Send commands; the future gives their replies, a refusal as a `hiredis.ReplyError` in its place.

        The future raises `CacheUnavailable` when the replies do not come in time or the connection ends.

        Raises:
            CacheUnavailable: the lane is closed; nothing was sent.
            CacheRefused: too many commands wait already; nothing was sent.
        """
        if self.closed or self._transport.is_closing():
            raise CacheUnavailable("the connection is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise CacheRefused(f"more than {MAX_WAITING} commands are under way")
        replies: Replies = self._loop.create_future()
        self._waiting.append((replies, len(commands), self._loop.time() + self._timeout_s))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)
        self._transport.write(_pack(commands[0]) if len(commands) == 1 else b"".join(map(_pack, commands)))
        return replies

    def close(self, reason: str = "the connection was closed") -> None:
        """Close, and fail whatever waits."""
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._transport.abort()
        # Its stream is not its own any more; without one it has nothing to close or to complain about.
        self._connection._reader = self._connection._writer = None  # noqa: SLF001
        waiting, self._waiting = self._waiting, deque()
        for replies, _, _ in waiting:
            if not replies.done():
                replies.set_exception(CacheUnavailable(reason))
                replies.exception()  # marked as seen: who asked may be gone

    def data_received(self, data: bytes) -> None:
        """Replies, or parts of some."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._replies.append(reply)
                if not self._waiting:
                    self.close("the server answers what nobody asked")
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
        """The other end closed."""
        self.close(f"the connection ended: {exc or 'closed by the server'}")

    def _look(self) -> None:
        """Watch over the oldest command."""
        self._watch = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        left = oldest[2] - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            # Our own loop may have been busy, and the reply lie in the socket: one more look there.
            self._watch = self._loop.call_later(_LAST_LOOK_S, self._give_up, oldest)

    def _give_up(self, oldest: tuple[Replies, int, float]) -> None:
        self._watch = None
        if self._waiting and self._waiting[0] is oldest:
            self.close(f"no answer within {self._timeout_s * 1000:.0f} ms")
        else:
            self._look()
