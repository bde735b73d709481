"""The hit path: answers a plain `GET /profiles/{user_id}` or `POST /profiles/batch` without the framework.

It answers 200 or nothing: whatever it does not recognise at a glance (an escape, an odd id, another query than
`features=`, a body where none belongs, a key that is not good, trouble while reading) goes on to the documented route,
which is the reference, with what was read of its body; where there is too much load, no further than to the gateway.
`tests/integration/api/middleware/test_fast_path.py` drives both with the same requests and demands the same answers.
Invariant: what it answers is what the documented route would have answered, request id and metrics included.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Iterable
from time import perf_counter

import msgspec
from litestar.enums import ScopeType
from litestar.types import (
    ASGIApp,
    HTTPReceiveMessage,
    HTTPScope,
    Receive,
    Scope,
    Send,
    WebSocketReceiveMessage,
)

from app.api.auth.authentication import Authenticator, names_this_machine
from app.api.middleware.body_limits import BODY_S, Bodies, Timer, too_slow
from app.api.middleware.edge import (
    CACHE_CONTROL,
    MAX_HEADER_BYTES,
    MAX_TARGET_BYTES,
    NO_SNIFF,
    own_request_id,
    request_id_of,
)
from app.api.middleware.load_shedding import mark
from app.api.rendering import Renderer
from app.api.schemas import BatchRequest
from app.errors import Overloaded, ProfilesError, UnknownFeature
from app.features.ids import id_problem
from app.features.registry import Registry
from app.profiles.online.reader import ProfileReader
from app.telemetry import REQUEST_ID, Metrics, logger
from app.telemetry.counters import FastHistogram

ONE, BATCH = ("GET", "/profiles/{user_id}"), ("POST", "/profiles/batch")
_PATH = re.compile(rb"/profiles/(?!batch$|history$)([A-Za-z0-9_~@:\-][A-Za-z0-9_~@:.\-]{0,127})").fullmatch
_SELECTION = re.compile(rb"features=([A-Za-z0-9_]+(?:,[A-Za-z0-9_]+)*)").fullmatch
_LENGTH = re.compile(rb"[1-9][0-9]{0,5}").fullmatch  # of a body that may be taken in whole: under a megabyte
_NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"content-encoding"})
_OF_A_BODY = frozenset({b"content-length", b"content-type"})
_JSON = (b"content-type", b"application/json")
_SELECTIONS_CAP = 1_024
_decode_batch = msgspec.json.Decoder(BatchRequest).decode
_Received = HTTPReceiveMessage | WebSocketReceiveMessage
log = logger("api")


# The request's id, and whether it has a body: of JSON, and of a length that is known and moderate.
_Admitted = tuple[bytes, bool]


class FastPath:
    """ASGI, around the gateway."""

    def __init__(self, inner: ASGIApp, bodies: Bodies) -> None:
        self._inner = inner
        self._bodies = bodies
        self._reader: ProfileReader | None = None

    def open(self, reader: ProfileReader, registry: Registry, authenticator: Authenticator, metrics: Metrics) -> None:
        """From now on hits are answered here."""
        self._registry = registry
        self._renderer = Renderer(registry)
        self._grants = authenticator.grants
        self._keyless = authenticator.keyless
        # Each made at its first hit: a series that exists claims that something was answered.
        self._seconds: dict[tuple[str, str], FastHistogram] = {}
        self._request_seconds = metrics.request_seconds
        self._masks = {b"": registry.full_mask}
        self._tells = logging.getLogger().isEnabledFor(logging.DEBUG)
        # Kept, for to ask which loop is running costs a system call in Python 3.11.
        self._loop = asyncio.get_running_loop()
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP and self._reader is not None:
            path = scope.get("raw_path") or b""
            if scope["method"] == "GET":
                found = _PATH(path)
                if found is not None and await self._answered(scope, found[1], self._reader, send):
                    return
            elif scope["method"] == "POST" and path == b"/profiles/batch" and not scope["query_string"]:
                taken: list[_Received | None] = []
                try:
                    if await self._answered_batch(scope, self._reader, receive, taken, send):
                        return
                finally:
                    self._bodies.held -= _size(taken)
                if taken:
                    receive = _again(taken, receive)
        await self._inner(scope, receive, send)

    async def _answered(self, scope: HTTPScope, user: bytes, reader: ProfileReader, send: Send) -> bool:
        started, admitted = perf_counter(), None
        try:
            mask = self._mask(scope["query_string"])
            admitted = self._admitted(scope["headers"]) if mask else None
            if admitted is None or admitted[1]:
                return False
            user_id = user.decode()
            values = reader.local_values(user_id, mask) or (await reader.read_shared_values({user_id: mask}))[user_id]
        except Overloaded as error:
            return _sent_away(scope, ONE, error)
        except ProfilesError:
            return False  # the documented route meets the same, and tells it properly
        except Exception:  # a defect: known by this line, and no reason not to answer
            log.exception("hit_path_failed", **_id_of(admitted))
            return False
        body = self._renderer.template(mask) % (b'"%b"' % user, *values)
        await self._send(send, body, admitted[0], ONE, started)
        return True

    async def _answered_batch(
        self, scope: HTTPScope, reader: ProfileReader, receive: Receive, taken: list[_Received | None], send: Send
    ) -> bool:
        started, admitted = perf_counter(), None
        try:
            admitted = self._admitted(scope["headers"])
            if admitted is None or not admitted[1]:
                return False
            body = await self._whole(receive, taken)
            asked = _decode_batch(body)
            if any(map(id_problem, asked.user_ids)):
                return False
            mask = self._registry.full_mask if asked.features is None else self._registry.mask(asked.features)
            values = await reader.read_values(dict.fromkeys(asked.user_ids, mask))
        except Overloaded as error:
            return _sent_away(scope, BATCH, error)
        except (ProfilesError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        except Exception:  # as above
            log.exception("hit_path_failed", **_id_of(admitted))
            return False
        await self._send(send, self._renderer.batch(asked.user_ids, values, mask), admitted[0], BATCH, started)
        return True

    def _mask(self, query: bytes) -> int:
        """The features asked for; 0 where this path cannot tell."""
        mask = self._masks.get(query)
        if mask is None:
            selection = _SELECTION(query) if len(query) <= MAX_TARGET_BYTES else None
            try:
                mask = self._registry.mask(selection[1].decode().split(",")) if selection is not None else 0
            except UnknownFeature:
                mask = 0
            if mask and len(self._masks) < _SELECTIONS_CAP:
                self._masks[query] = mask
        return mask

    def _admitted(self, headers: Iterable[tuple[bytes, bytes]]) -> _Admitted | None:
        """What the headers say; None where the key is not good or something else is out of the ordinary."""
        key: str | None = None
        request_id: bytes | None = None
        hosts = of_a_body = 0
        for name, value in headers:
            if name in _NOT_PLAIN or len(value) > MAX_HEADER_BYTES:
                return None
            if name == b"x-api-key":
                if key is not None:
                    return None
                key = value.decode("latin-1")
            elif name == b"x-request-id":
                request_id = request_id or request_id_of(value)
            elif name in _OF_A_BODY:
                if not (_LENGTH(value) if name == b"content-length" else value == b"application/json"):
                    return None
                of_a_body += 1
            elif name == b"host":
                hosts += 1 if not self._keyless or names_this_machine(value.decode("latin-1")) else 2
        if hosts > 1 or of_a_body == 1 or not self._grants(key, "read"):
            return None
        return request_id or own_request_id(), of_a_body == 2

    async def _whole(self, receive: Receive, taken: list[_Received | None]) -> bytes:
        """A body; what came of it, or instead of it, is left in `taken`, and counts as held."""
        body = b""
        timer = Timer(self._loop, BODY_S)
        try:
            while True:
                message = await receive()
                taken.append(message)
                if message["type"] != "http.request":
                    return b""
                body += message["body"]
                self._bodies.held += len(message["body"])
                if self._bodies.full:
                    return b""
                if not message.get("more_body", False):
                    return body
        except asyncio.CancelledError:
            if not timer.caused():
                raise
            taken.append(None)
            return b""
        finally:
            timer.stop()

    async def _send(self, send: Send, body: bytes, request_id: bytes, route: tuple[str, str], started: float) -> None:
        length = (b"content-length", b"%d" % len(body))
        headers = [_JSON, length, (b"x-request-id", request_id), NO_SNIFF, CACHE_CONTROL]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        elapsed = perf_counter() - started
        seconds = self._seconds.get(route)
        if seconds is None:
            seconds = self._seconds[route] = self._request_seconds.labels(*route, 200)
        seconds.observe(elapsed)
        if self._tells:
            fields = {REQUEST_ID: request_id.decode(), "method": route[0], "route": route[1], "status": 200}
            log.debug("request", **fields, ms=round(elapsed * 1000, 2))


def _sent_away(scope: HTTPScope, route: tuple[str, str], error: Overloaded) -> bool:
    """Nothing is answered here, and the documented route need not try the same again."""
    mark(scope, error.kind)
    scope["path_template"] = route[1]
    return False


def _id_of(admitted: _Admitted | None) -> dict[str, str]:
    return {REQUEST_ID: admitted[0].decode()} if admitted is not None else {}


def _size(taken: Iterable[_Received | None]) -> int:
    return sum(len(part["body"]) for part in taken if part is not None and part["type"] == "http.request")


def _again(taken: list[_Received | None], receive: Receive) -> Receive:
    """Gives what was taken already, then what comes; None stands for a body that did not come in time."""
    waiting = deque(taken)

    async def give() -> _Received:
        if not waiting:
            return await receive()
        part = waiting.popleft()
        if part is None:
            raise too_slow()
        return part

    return give
