"""The fast path: answers plain `GET /profiles/{user_id}`, `POST /profiles/batch`, `POST /score` and `POST /events`
without Litestar, and sends only successful responses.

A request that fails or is not plain (an escape, an unusual id, a query other than `features=`, an unexpected header or
body, an invalid key) goes on to Litestar's route, with the body that was read here. In two cases, the route does not
carry the request out again. If it was shed for overload, it is rejected. If storing events or a decision failed, the
route only responds with that error.
Invariant: the response is the one that Litestar's route would give, and it is counted and logged in the same way.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPReceiveMessage, HTTPScope, Receive, Scope, Send, WebSocketReceiveMessage

from app.api.auth.authentication import Authenticator, names_this_machine
from app.api.middleware.body_limits import Body
from app.api.middleware.edge import (
    CACHE_CONTROL,
    MAX_HEADER_BYTES,
    MAX_TARGET_BYTES,
    NO_SNIFF,
    REQUEST_ID_FORMAT,
    Edge,
    begin,
    random_bits,
    valid_request_id,
)
from app.api.problems import mark_shed
from app.api.rendering import Renderer
from app.api.schemas import BatchRequest
from app.errors import Overloaded, ProfilesError, UnknownFeature
from app.features.ids import all_allowed
from app.profiles.online.reader import ProfileReader
from app.settings.parsers import ApiKey
from app.telemetry import REQUEST_ID, Metrics, logger
from app.telemetry.counters import FastHistogram

Route = tuple[str, str, int]  # the method, the path template, and the status of a response
ONE: Route = ("GET", "/profiles/{user_id}", 200)
_PATH = re.compile(rb"/profiles/(?!batch$|history$)([A-Za-z0-9_~@:\-][A-Za-z0-9_~@:.\-]{0,127})").fullmatch
_SELECTION = re.compile(rb"features=([A-Za-z0-9_]+(?:,[A-Za-z0-9_]+)*)").fullmatch
_LENGTH = re.compile(rb"[1-9][0-9]{0,5}").fullmatch  # bodies under a megabyte
_NOT_PLAIN = frozenset({b"transfer-encoding", b"expect", b"content-encoding"})
_CROSS_SITE = frozenset({b"origin", b"sec-fetch-site"})  # Litestar's guard checks them for every POST
_JSON = (b"content-type", b"application/json")
_decode_batch = msgspec.json.Decoder(BatchRequest).decode
# The body of a response, from that of a request and its caller; None if Litestar's route must answer.
Answer = Callable[[bytes, ApiKey], Awaitable[bytes | None]]
Do = Callable[[ApiKey, bytes], Awaitable[bytes | None]]
# What Litestar's route receives: the error that it is to report, if any, and the body, if it was read here.
Taken = list[bytes | Exception]
log = logger("api")


class Post(NamedTuple):
    """A POST of JSON that the fast path answers, and the scope that the caller needs. If `answer` fails for
    a POST that is `repeatable`, Litestar's route does the work again, unless the request was shed. For any other POST,
    the route only reports the error of `answer`."""

    route: Route
    scope: str
    answer: Answer
    repeatable: bool = False


class FastPath:
    def __init__(
        self,
        inner: Edge,
        reader: ProfileReader,
        renderer: Renderer,
        authenticator: Authenticator,
        metrics: Metrics,
        posts: Iterable[Post],
    ) -> None:
        self.inner: ASGIApp = inner
        self._bodies = inner.bodies
        self._overload = inner.overload
        self._reader = reader
        self._registry = renderer.registry
        self._renderer = renderer
        self._find = authenticator.find
        self._keyless = authenticator.keyless
        # Each histogram is created by its first answer, so that `/metrics` shows no series without observations.
        self._seconds: dict[Route, FastHistogram] = {}
        self._request_seconds = metrics.request_seconds
        self._mask = lru_cache(maxsize=1_024)(self._mask_of)
        self._logs_requests = logging.getLogger().isEnabledFor(logging.DEBUG)
        batch = Post(("POST", "/profiles/batch", 200), "read", self._batch, repeatable=True)
        self._posts = {post.route[1].encode(): post for post in (batch, *posts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            path = scope.get("raw_path") or b""
            if scope["method"] == "GET":
                found = _PATH(path)
                if found is not None:
                    read = partial(self._one, scope, found[1])
                    if await self._answer(scope, send, ONE, "read", read):
                        return
            elif scope["method"] == "POST" and (post := self._posts.get(path)) and not scope["query_string"]:
                body, taken = Body(scope, receive, self._bodies), Taken()
                do = partial(self._post, scope, post, body, taken)
                try:
                    if await self._answer(scope, send, post.route, post.scope, do):
                        return
                finally:
                    body.forget()
                if taken:
                    receive = _replay(taken, receive)
        await self.inner(scope, receive, send)

    async def _answer(self, scope: HTTPScope, send: Send, route: Route, needs: str, do: Do) -> bool:
        """Send the body that `do` returns for the caller and the request id. Return False, with nothing sent, if the
        request must go on to Litestar's route. `needs`: the scope that the key must have."""
        started = perf_counter()
        try:
            admitted = self._admit(scope["headers"], needs, with_body=route is not ONE)
            if admitted is None or (body := await do(*admitted)) is None:
                return False
        except Overloaded as error:
            mark_shed(scope, error.kind)  # the edge rejects it, so the Litestar route does not try again
            scope["path_template"] = route[1]
            return False
        except ProfilesError:
            return False  # the Litestar route meets the same error and reports it
        except Exception:  # a defect of this path; the Litestar route may still answer
            begin(scope)  # so that this line has the request id of the answer
            log.exception("fast_path_failed")
            return False
        scope["path_template"] = route[1]
        length = (b"content-length", b"%d" % len(body))
        headers = [_JSON, length, (b"x-request-id", admitted[1]), NO_SNIFF, CACHE_CONTROL]
        await send({"type": "http.response.start", "status": route[2], "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        elapsed = perf_counter() - started
        seconds = self._seconds.get(route)
        if seconds is None:
            seconds = self._seconds[route] = self._request_seconds.labels(*route)
        seconds.observe(elapsed)
        if self._logs_requests:
            fields = {REQUEST_ID: admitted[1].decode(), "method": route[0], "route": route[1], "status": route[2]}
            log.debug("request", **fields, ms=round(elapsed * 1000, 2))
        return True

    async def _one(self, scope: HTTPScope, user: bytes, *_: object) -> bytes | None:
        query = scope["query_string"]
        mask = self._mask(query) if len(query) <= MAX_TARGET_BYTES else 0
        if not mask:
            return None
        reader, user_id = self._reader, user.decode()
        values = reader.local_values(user_id, mask) or (await reader.read_shared_values({user_id: mask}))[user_id]
        return self._renderer.template(mask) % (b'"%b"' % user, *values)

    async def _post(
        self, scope: HTTPScope, post: Post, body: Body, taken: Taken, caller: ApiKey, request_id: bytes
    ) -> bytes | None:
        if self._overload(scope) is not None:
            return None  # the edge lets the request wait, or rejects it
        begin(scope, request_id)
        content, more = b"", True
        try:
            while more:
                message: Any = await body.receive()
                content += message.get("body", b"")
                more = message.get("more_body", False)
        except ProfilesError as error:
            taken.append(error)
            return None
        taken.append(content)
        try:
            return await post.answer(content, caller)
        except Exception as error:
            if post.repeatable:
                raise
            taken.insert(0, error)
            return None

    async def _batch(self, content: bytes, _: ApiKey) -> bytes | None:
        try:
            asked = _decode_batch(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if not all_allowed(asked.user_ids):
            return None
        mask = self._registry.mask(asked.features)
        values = await self._reader.read_values(dict.fromkeys(asked.user_ids, mask))
        return self._renderer.batch(asked.user_ids, values, mask)

    def _mask_of(self, query: bytes) -> int:
        """The bit mask of the requested features; 0 if the query is not `features=a,b` or names an unknown feature."""
        if not query:
            return self._registry.full_mask
        try:
            selection = _SELECTION(query)
            return self._registry.mask(selection[1].decode().split(",")) if selection is not None else 0
        except UnknownFeature:
            return 0

    def _admit(
        self, headers: Iterable[tuple[bytes, bytes]], needs: str, *, with_body: bool
    ) -> tuple[ApiKey, bytes] | None:
        """The caller and the request id. None if Litestar's route must answer: a header is unusual, or the key lacks
        the scope `needs`. If `with_body`, a request must have both a content type and a length, otherwise neither."""
        key: str | None = None
        request_id: bytes | None = None
        hosts = body_headers = 0
        for name, value in headers:
            if name in _NOT_PLAIN or (with_body and name in _CROSS_SITE) or len(value) > MAX_HEADER_BYTES:
                return None
            if name == b"x-api-key":
                if key is not None:
                    return None
                key = value.decode("latin-1")
            elif name == b"x-request-id":
                request_id = request_id or valid_request_id(value)
            elif name in {b"content-length", b"content-type"}:
                if not (_LENGTH(value) if name == b"content-length" else value == b"application/json"):
                    return None
                body_headers += 1
            elif name == b"host":
                hosts += 1 if not self._keyless or names_this_machine(value.decode("latin-1")) else 2
        caller = self._find(key)
        if hosts > 1 or body_headers != 2 * with_body or caller is None or needs not in caller.scopes:
            return None
        return caller, request_id or REQUEST_ID_FORMAT % random_bits(64)  # as `request_id_of`


def _replay(taken: Taken, receive: Receive) -> Receive:
    """An ASGI `receive` that raises each error and returns each body in `taken`, in order, and then calls `receive`."""

    async def replay() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        if not taken:
            return await receive()
        part = taken.pop(0)
        if isinstance(part, bytes):
            return {"type": "http.request", "body": part, "more_body": False}
        try:
            raise part
        finally:
            del part  # otherwise exception and frame form a reference cycle that keeps the connection open

    return replay
