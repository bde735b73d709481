"""Limits on request bodies: on the memory of all bodies together, and on the time that each body takes to arrive.

Bytes count when they arrive, not when `Content-Length` announces them, so a client that announces a large body and
sends little takes no room from others.
Invariant: a request waits at most `BODY_S` for its body, however slowly the client sends it.
"""

import asyncio
import math
from contextlib import suppress
from typing import Any, cast

import msgspec
from litestar.types import HTTPReceiveMessage, HTTPScope, Receive

from app.errors import Overloaded, TooSlow, Undecodable

BODY_S = 30.0
# The limit for all requests of this process. One body has at most 8 MB; decoded, it takes several times as much.
BODIES_BYTES = 64 * 1024 * 1024
DRAIN_BYTES = 64 * 1024 * 1024
DRAIN_S = 10.0


class Bodies(msgspec.Struct, eq=False):
    """The bodies of all requests that are not answered yet. `held`: how many of their bytes are in memory."""

    held: int = 0
    _waiting: dict[asyncio.Task[Any], float] = msgspec.field(default_factory=dict)
    _timer: asyncio.Handle | None = None
    _timer_at: float = math.inf

    async def wait(self, receive: Receive, until: float) -> HTTPReceiveMessage:
        """Call `receive`. Raises `TooSlow` if no message has arrived by `until`, a time of the event loop."""
        # One timer for all bodies: `asyncio.timeout`, with a timer for each, takes 4 % of the time of a decision.
        task = cast(asyncio.Task[Any], asyncio.current_task())
        self._waiting[task] = until
        try:
            if until < self._timer_at:
                self._check_at(until)
            return await receive()  # type: ignore[return-value]  # HTTP only
        except asyncio.CancelledError:
            # Not bound to a name: exception and frame would form a reference cycle that keeps the connection open.
            if task in self._waiting or task.uncancel():  # someone else has cancelled the task
                raise
            raise TooSlow(f"the body did not arrive within {BODY_S:g} seconds; send the request again") from None
        finally:
            self._waiting.pop(task, None)

    def _check_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = asyncio.get_running_loop().call_at(at, self._end_overdue), at

    def _end_overdue(self) -> None:
        now = asyncio.get_running_loop().time()
        for task in [task for task, until in self._waiting.items() if until <= now]:
            del self._waiting[task]
            task.cancel()
        self._timer_at = math.inf
        if self._waiting:
            self._check_at(min(self._waiting.values()))


class Body:
    """Receives the body of one request and counts its bytes in `bodies`."""

    def __init__(self, scope: HTTPScope, receive: Receive, bodies: Bodies) -> None:
        headers = dict(scope["headers"])
        self._receive = receive
        self._bodies = bodies
        self._held = 0
        self._until: float | None = None
        chunked, length = b"transfer-encoding" in headers, headers.get(b"content-length")
        self._more = chunked or length not in (None, b"0")
        # Without leading zeros: `int` refuses more than 4,300 digits.
        self._left = math.inf if chunked or length is None else int(length.lstrip(b"0") or b"0")
        # With this header, a client sends no body before the server asks for it.
        self._waits = headers.get(b"expect", b"").lower() == b"100-continue"

    @property
    def unread(self) -> bool:
        """Whether more of the body is to be expected. False after the last part, and while the client waits for
        `100 Continue` before it sends anything."""
        return self._more and not self._waits

    async def receive(self) -> HTTPReceiveMessage:
        """Receive the next ASGI message. Raises `Undecodable` if the client disconnected before the body was complete,
        `TooSlow` if the body did not arrive in time, and `Overloaded` if all bodies together exceed the limit."""
        self._waits = False
        message = await (self._in_time() if self._more else self._receive())
        if message["type"] == "http.request":
            size = len(message["body"])
            self._left -= size
            # granian reports the end of a body in a message of its own. Waiting for it would take as long again.
            self._more = message["more_body"] = message.get("more_body", False) and self._left > 0
            self._held += size
            self._bodies.held += size
            if self._bodies.held > BODIES_BYTES:
                raise Overloaded("bodies")
        elif self._more:
            self._more = False
            raise Undecodable("the body ended before it was complete")
        return message  # type: ignore[return-value]  # HTTP only

    async def drain(self) -> None:
        """Receive and discard the rest of the body, up to a limit of bytes and time."""
        self.forget()
        left = DRAIN_BYTES
        with suppress(TimeoutError, Undecodable, TooSlow, Overloaded):
            async with asyncio.timeout(DRAIN_S):
                while self.unread and left > 0:
                    message = await self.receive()
                    left -= len(message["body"]) if message["type"] == "http.request" else 0
                    self.forget()

    def forget(self) -> None:
        """Release the bytes received so far: they no longer count towards the limit of all requests."""
        self._bodies.held -= self._held
        self._held = 0

    async def _in_time(self) -> HTTPReceiveMessage:
        self._until = self._until or asyncio.get_running_loop().time() + BODY_S
        try:
            return await self._bodies.wait(self._receive, self._until)
        except TooSlow:  # here, or in the fast path, which has waited for this body
            self._more = False  # so that `drain` does not wait for the rest
            raise
