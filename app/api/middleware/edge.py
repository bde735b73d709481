"""What every request passes before and after the routes: identity, strict paths, headers, metrics, the log line.

Litestar's router decodes paths leniently; here bytes that are not UTF-8 and broken percent-escapes are refused (400),
an encoded `/`, which would make two segments of one id (422), and an empty segment, which the router would drop (404).
Here is the bound on what a head may make the routes do, too: a longer target or header is refused (414, 431) before
anything parses it, and of cookies only our own go on, since Litestar undoes a cookie's quoting in quadratic time.
Invariants: whatever happens behind it, a request is answered with an `X-Request-Id`, counted once, and logged without
its headers; and nothing is answered before the body was taken in, up to a bound, because a connection with an unread
body is reset, and its sender would never see the answer.
"""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from random import Random
from time import perf_counter
from urllib.parse import unquote_to_bytes

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from app.api.middleware.body_limits import Bodies, Body
from app.api.middleware.load_shedding import DETAIL, Shedding, mark_of
from app.api.middleware.rate_limit import is_limited
from app.api.middleware.request_smuggling import framing_problem
from app.api.problems import MEDIA_TYPE, encoded, headers_of
from app.telemetry import REQUEST_ID, Metrics, logger
from app.telemetry.structlog_without_rich import structlog

CUT_SHORT = 499  # as in nginx: the client was gone, or the process ended; no fault of the service
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# As nginx and Apache have it by default.
MAX_TARGET_BYTES = MAX_HEADER_BYTES = 8 * 1024
MAX_PARAMETERS = MAX_COOKIES = 64  # of either, Litestar keeps the last thousand that it has parsed
# Ours are signed, in the alphabet of URL-safe base64: nothing in them is quoted.
_OWN_COOKIE = re.compile(rb"(?:^|;)[ \t]*(profiles_[A-Za-z0-9_]+=[A-Za-z0-9_.\-]*)[ \t]*(?=;|$)")
# A client may send any word as its method: what is none of these counts as one.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_SNIFF = (b"x-content-type-options", b"nosniff")
CACHE_CONTROL = (b"cache-control", b"no-store")
_random = Random()  # noqa: S311  # to tell requests apart, not to keep anybody out
log = logger("api")


class Edge:
    """ASGI, around Litestar's own handler."""

    def __init__(self, inner: ASGIApp, metrics: Metrics) -> None:
        self._inner = inner
        self._metrics = metrics
        self.bodies = Bodies()
        self.shedding = Shedding(metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            await self._answer(scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    async def _answer(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        request_id = _request_id(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**{REQUEST_ID: request_id.decode()})
        status = 500
        body = Body(scope, receive, self.bodies)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if body.unread:
                    await body.drain()
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id), NO_SNIFF]
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append(CACHE_CONTROL)
                message["headers"] = headers
            await send(message)

        try:
            refusal = await self._turned_away(scope) or _refusal(scope)
            if refusal is None:
                _drop_foreign_cookies(scope)
                await self._passed_on(scope, body.receive, send_marked)
            else:
                await _refuse(send_marked, *refusal)
        except asyncio.CancelledError:
            status = CUT_SHORT
            raise
        finally:
            body.forget()
            self._note(scope, status, perf_counter() - started)

    async def _passed_on(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._inner(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = HttpMethod.GET.value
        try:
            await self._inner(scope, receive, send_without_body)
        finally:
            scope["method"] = HttpMethod.HEAD.value

    async def _turned_away(self, scope: HTTPScope) -> tuple[int, str] | None:
        if is_limited(scope):
            return 429, "too many requests with this key, or from this address; the next one may follow Retry-After"
        kind = await self.shedding.look(scope)
        return (503, DETAIL.format(kind)) if kind is not None else None

    def _note(self, scope: HTTPScope, status: int, elapsed: float) -> None:
        route = scope.get("path_template") or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.request_seconds.labels(method, route, status).observe(elapsed)
        shed = mark_of(scope)
        if shed is not None:
            self.shedding.note(shed)
        # Of a full disk the database tells once, of load the shedding; the log may lie on the same disk.
        quiet = status < 400 or status == 507 or shed
        level = log.debug if quiet else log.info if status < 500 else log.error
        level("request", method=method, route=route, status=status, ms=round(elapsed * 1000, 2))


def request_id_of(value: bytes) -> bytes | None:
    """A caller's own id, where it may stand in headers and logs."""
    return value if _REQUEST_ID.fullmatch(value) else None


def own_request_id() -> bytes:
    """An id for a request that brought none: unlike any other, not secret."""
    return b"%016x" % _random.getrandbits(64)


def _request_id(scope: HTTPScope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and (own := request_id_of(value)) is not None:
            return own
    return own_request_id()


def _too_long(scope: HTTPScope, path: bytes) -> tuple[int, str] | None:
    if max(len(path), len(scope["query_string"])) > MAX_TARGET_BYTES:
        return 414, f"the path and the query may have {MAX_TARGET_BYTES:,} bytes each"
    if scope["query_string"].count(b"&") >= MAX_PARAMETERS:
        return 400, f"the query may have {MAX_PARAMETERS} parameters"
    for name, value in scope["headers"]:
        if len(value) > MAX_HEADER_BYTES:
            advice = "; delete the cookies of other applications on this host" if name == b"cookie" else ""
            shown = name[:40].decode("latin-1")
            return 431, f"the header {shown} has {len(value):,} bytes; allowed are {MAX_HEADER_BYTES:,}{advice}"
    return None


def _refusal(scope: HTTPScope) -> tuple[int, str] | None:
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.split(b"?", 1)[0]
    query = scope["query_string"]
    if (too_long := _too_long(scope, path)) is not None:
        return too_long
    if (problem := framing_problem(scope)) is not None:
        return 400, problem
    if b"//" in path:
        return 404, "there is nothing at this path: it has an empty segment (//)"
    if _BROKEN_ESCAPE.search(path) or _BROKEN_ESCAPE.search(query):
        return 400, "a % in the path or the query must be followed by two hexadecimal digits; write % itself as %25"
    if b"%" in path:
        if b"%2f" in path.lower():
            return 422, "an id must not contain / (%2F in the path)"
        try:
            scope["path"] = unquote_to_bytes(path).decode()
        except UnicodeDecodeError:
            return 400, "the path is not UTF-8 once its percent-escapes are decoded"
    if b"%" in query or not query.isascii():
        try:
            unquote_to_bytes(query).decode()
        except UnicodeDecodeError:
            return 400, "the query is not UTF-8 once its percent-escapes are decoded"
    return None


def _drop_foreign_cookies(scope: HTTPScope) -> None:
    cookies = [value for name, value in scope["headers"] if name == b"cookie"]
    if cookies:
        own = b"; ".join(_OWN_COOKIE.findall(b";".join(cookies))[:MAX_COOKIES])
        scope["headers"] = [*(item for item in scope["headers"] if item[0] != b"cookie"), (b"cookie", own)]


@lru_cache(64)  # where there is too much to do, the same is said thousands of times
def _said(status: int, detail: str) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    body = encoded(status, detail)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in headers_of(status).items()]
    return body, tuple(headers)


async def _refuse(send: Send, status: int, detail: str) -> None:
    body, headers = _said(status, detail)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
