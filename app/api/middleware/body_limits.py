"""Requests' bodies on their way in: bounded in bytes, all requests together, and in time, each by itself.

A body counts as it comes in, not as it is announced: who announces much and sends little takes little away from others.
Invariant: a wait for a sender ends after `BODY_S`, however little at a time the sender sends.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from litestar.types import HTTPReceiveMessage, HTTPScope, Receive

from app.errors import Overloaded, TooSlow, Undecodable

BODY_S = 30.0
# Held at once by this process. A request may bring 8 MB, and its decoded form takes several times as much.
BODIES_BYTES = 64 * 1024 * 1024
DRAIN_BYTES = 64 * 1024 * 1024
DRAIN_S = 10.0


class Bodies:
    """How many bytes of bodies are held in requests that are not answered yet."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    @property
    def full(self) -> bool:
        """Whether that is too much."""
        return self.held > BODIES_BYTES


class Timer:
    """Interrupts what its task waits for, once its time is over. For a fraction of what `asyncio.timeout` takes."""

    __slots__ = ("_handle", "_task", "over")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._task = asyncio.current_task(loop)
        self.over = False
        self._handle = loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self.over = True
        if self._task is not None:
            self._task.cancel()

    def stop(self) -> None:
        """Let it go."""
        self._handle.cancel()

    def caused(self) -> bool:
        """Whether a cancellation is this timer's alone; it is taken back then."""
        return self.over and self._task is not None and self._task.uncancel() == 0


def too_slow() -> TooSlow:
    """What a sender is told."""
    return TooSlow(f"the body did not come in within {BODY_S:g} seconds")


class Body:
    """One request's."""

    def __init__(self, scope: HTTPScope, receive: Receive, bodies: Bodies) -> None:
        headers = dict(scope["headers"])
        self._receive = receive
        self._bodies = bodies
        self._held = 0
        self._until: float | None = None
        self._more = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        # Such a sender waits until the body is requested.
        self._waits = headers.get(b"expect", b"").lower() == b"100-continue"

    @property
    def unread(self) -> bool:
        """Whether more is on its way."""
        return self._more and not self._waits

    async def receive(self) -> HTTPReceiveMessage:
        """The next part.

        Raises:
            Undecodable: the sender broke off.
            TooSlow: the body is not complete in time.
            Overloaded: too many bodies are held already.
        """
        self._waits = False
        message = await (self._in_time() if self._more else self._receive())
        if message["type"] == "http.request":
            self._more = message.get("more_body", False)
            self._held += len(message["body"])
            self._bodies.held += len(message["body"])
            if self._bodies.full:
                raise Overloaded("bodies")
        elif self._more:
            self._more = False
            raise Undecodable("the body ended before it was complete")
        return message  # type: ignore[return-value]  # no websocket comes here

    async def drain(self) -> None:
        """Receive and discard the unread rest."""
        self.forget()
        left = DRAIN_BYTES
        with suppress(TimeoutError, Undecodable, TooSlow, Overloaded):
            async with asyncio.timeout(DRAIN_S):
                while self.unread and left > 0:
                    message = await self.receive()
                    left -= len(message["body"]) if message["type"] == "http.request" else 0
                    self.forget()

    def forget(self) -> None:
        """It is held no longer."""
        self._bodies.held -= self._held
        self._held = 0

    async def _in_time(self) -> HTTPReceiveMessage:
        loop = asyncio.get_running_loop()
        if self._until is None:
            self._until = loop.time() + BODY_S
        timer = Timer(loop, self._until - loop.time())
        try:
            return await self._receive()  # type: ignore[return-value]  # as above
        except asyncio.CancelledError:
            if not timer.caused():
                raise
            self._more = False  # the rest is not waited for
            # Not bound to a name: exception and frame would keep each other and the connection alive.
            raise too_slow() from None
        finally:
            timer.stop()
