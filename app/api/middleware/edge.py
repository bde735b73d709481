"""The ASGI middleware next to Litestar: request ids, strict paths, limits, response headers, metrics, log line.

Litestar's router decodes paths leniently. The edge rejects bytes that are not UTF-8 and broken percent-escapes (400),
an encoded `/`, which would split an id into two segments (422), and an empty segment, which the router would drop
(404). It limits the cost of parsing: a path, query string or header that is too long is rejected unparsed (414, 431),
and only our own cookies are passed on, because Litestar unquotes cookies in quadratic time.

It sheds requests to `/events`, `/score` and `/profiles/history` that would wait too long, before it reads their body.
Other requests are shed when the layer that serves them raises `Overloaded`.

Invariants: every response has an `X-Request-Id`; every request is counted once and logged without its headers. A shed
request is answered 503 with `Retry-After`, and counted by kind. The edge reads the body up to a limit before it
responds. If a connection were closed with an unread body, the client would receive a reset instead of the response.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from random import Random
from time import perf_counter
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from app.api.middleware.body_limits import Bodies, Body
from app.api.problems import HEADERS, MEDIA_TYPE, encoded, mark_shed, shed_kind
from app.concurrency.overload import OverloadQueue
from app.errors import Overloaded
from app.telemetry import REQUEST_ID, Metrics, logger
from app.telemetry.logs import structlog

CUT_SHORT = 499  # as in nginx: the client disconnected or the process stopped
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# The defaults of nginx and Apache.
MAX_TARGET_BYTES = MAX_HEADER_BYTES = 8 * 1024
MAX_PARAMETERS = MAX_COOKIES = 64  # Litestar caches 1,000 parsed queries and cookie headers
# Our cookies are signed text in URL-safe base64, which needs no quoting.
_OWN_COOKIE = re.compile(rb"(?:^|;)[ \t]*(profiles_[A-Za-z0-9_]+=[A-Za-z0-9_.\-]*)[ \t]*(?=;|$)")
# The label of the metric. A client may send any word as its method, so all others count as "other".
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ONCE = frozenset({b"host", b"x-api-key", b"content-type", b"content-encoding"})
NO_SNIFF = (b"x-content-type-options", b"nosniff")
CACHE_CONTROL = (b"cache-control", b"no-store")
REQUEST_ID_FORMAT = b"%016x"
_BEGUN = "begun"
WAIT_S = 2.0  # the longest wait before a request is shed: as long as events may wait for their commit
Rejection = tuple[int, str]  # the status, and what is wrong
# By method and path: the kind of load, and a function that says whether there is too much of it.
Checks = Mapping[tuple[str, str], tuple[str, Callable[[], bool]]]
random_bits = Random().getrandbits  # noqa: S311  # request ids are not secret
log = logger("api")


class Edge:
    def __init__(self, inner: ASGIApp, metrics: Metrics, checks: Checks) -> None:
        self._inner = inner
        self._metrics = metrics
        self._checks = checks
        self._queue = OverloadQueue(WAIT_S)
        self.bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            await self.answer(scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    def overload(self, scope: HTTPScope) -> str | None:
        """The kind of load, such as `events`, because of which a request must be shed now; None if it can be served."""
        check = self._checks.get((scope["method"], scope["path"]))
        return check[0] if check is not None and check[1]() else None

    async def _shed(self, scope: HTTPScope) -> str | None:
        """Return None if the request is admitted, else the kind of load because of which it is shed (see `mark_shed`).
        Under overload, the request first waits in the `OverloadQueue`, and is then checked again."""
        if (kind := shed_kind(scope)) is None and (kind := self.overload(scope)) is not None:
            if await self._queue.wait() and self.overload(scope) is None:
                return None
            mark_shed(scope, kind)
            scope["path_template"] = scope["path"]
        return kind

    async def answer(self, scope: HTTPScope, receive: Receive, send: Send, rejection: Rejection | None = None) -> None:
        """Answer a request or, if a `rejection` is given, reject it with its status and reason."""
        request_id, started = begin(scope)
        status, method = 500, scope["method"]
        body = Body(scope, receive, self.bodies)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.body" and method == "HEAD":
                message["body"] = b""
            elif message["type"] == "http.response.start":
                if body.unread:
                    await body.drain()
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id), NO_SNIFF]
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append(CACHE_CONTROL)
                message["headers"] = headers
            await send(message)

        try:
            if rejection is None and (kind := await self._shed(scope)) is not None:
                rejection = 503, str(Overloaded(kind))
            rejection = rejection or _rejection(scope)
            if rejection is None:
                _drop_foreign_cookies(scope)
                if method == "HEAD":
                    scope["method"] = HttpMethod.GET.value
                await self._inner(scope, body.receive, send_marked)
            else:
                problem, headers = _problem(*rejection)
                await send_marked({"type": "http.response.start", "status": rejection[0], "headers": headers})
                await send_marked({"type": "http.response.body", "body": problem, "more_body": False})
        except asyncio.CancelledError:
            status = CUT_SHORT
            raise
        finally:
            body.forget()
            scope["method"] = method
            self._record(scope, status, perf_counter() - started)

    def _record(self, scope: HTTPScope, status: int, elapsed: float) -> None:
        route = scope.get("path_template") or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.request_seconds.labels(method, route, status).observe(elapsed)
        if (shed := shed_kind(scope)) is not None:
            self._metrics.shed.labels(shed).inc()
            log.warning("request_shed", what=shed)
        # A full disk is logged once by the database, and a shed request by the line above.
        quiet = status < 400 or status == 507 or shed
        level = log.debug if quiet else log.info if status < 500 else log.error
        level("request", method=method, route=route, status=status, ms=round(elapsed * 1000, 2))


def begin(scope: HTTPScope, request_id: bytes | None = None) -> tuple[bytes, float]:
    """The id of a request, and when it began. The first call stores both, and adds the id to later log lines."""
    found = cast(tuple[bytes, float] | None, scope.get(_BEGUN))
    if found is None:
        found = cast(dict[str, Any], scope)[_BEGUN] = request_id or request_id_of(scope), perf_counter()
        structlog.contextvars.bind_contextvars(**{REQUEST_ID: found[0].decode()})
    return found


def valid_request_id(value: bytes) -> bytes | None:
    """The value of `X-Request-Id` if it is safe in headers and logs, else None."""
    return value if _REQUEST_ID.fullmatch(value) else None


def request_id_of(scope: HTTPScope) -> bytes:
    """The request id that the caller sent, if it is valid, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and (sent := valid_request_id(value)) is not None:
            return sent
    return REQUEST_ID_FORMAT % random_bits(64)


def _too_long(scope: HTTPScope, path: bytes) -> Rejection | None:
    if max(len(path), len(scope["query_string"])) > MAX_TARGET_BYTES:
        return 414, f"the path or the query is too long; each may have {MAX_TARGET_BYTES:,} bytes"
    if scope["query_string"].count(b"&") >= MAX_PARAMETERS:
        return 400, f"the query has too many parameters; at most {MAX_PARAMETERS} are allowed"
    for name, value in scope["headers"]:
        if len(value) > MAX_HEADER_BYTES:
            advice = "; delete the cookies of other applications on this host" if name == b"cookie" else ""
            shown = name[:40].decode("latin-1")
            return 431, f"the header {shown} has {len(value):,} bytes; the limit is {MAX_HEADER_BYTES:,}{advice}"
    return None


def _rejection(scope: HTTPScope) -> Rejection | None:
    path, query = (scope.get("raw_path") or scope["path"].encode()).split(b"?", 1)[0], scope["query_string"]
    if (too_long := _too_long(scope, path)) is not None:
        return too_long
    # granian rejects most attempts at request smuggling (two lengths, broken chunks, a space before a colon), but not
    # repeated headers. A proxy may have checked the first of two keys, hosts or types where we would read the last.
    names = [name for name, _ in scope["headers"] if name in _ONCE]
    if len(names) > len(set(names)):
        repeated = next(name for name in names if names.count(name) > 1)
        return 400, f"the header {repeated.decode()} occurs more than once; send it once"
    if b"//" in path:
        return 404, "not found: the path has an empty segment (//)"
    if _BROKEN_ESCAPE.search(path) or _BROKEN_ESCAPE.search(query):
        return 400, "a % in the path or the query must be followed by two hexadecimal digits; encode % itself as %25"
    if b"%2f" in path.lower():
        return 422, "an id must not contain / (%2F in the path)"
    part = "path"
    try:
        if b"%" in path:
            scope["path"] = unquote_to_bytes(path).decode()
        part = "query"
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError:
        return 400, f"the {part} is not UTF-8 once its percent-escapes are decoded"
    return None


def _drop_foreign_cookies(scope: HTTPScope) -> None:
    cookies = [value for name, value in scope["headers"] if name == b"cookie"]
    if cookies:
        own = b"; ".join(_OWN_COOKIE.findall(b";".join(cookies))[:MAX_COOKIES])
        scope["headers"] = [*(item for item in scope["headers"] if item[0] != b"cookie"), (b"cookie", own)]


@lru_cache(64)  # under overload the same response is sent thousands of times
def _problem(status: int, detail: str) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    body = encoded(status, detail)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in HEADERS.get(status, {}).items()]
    return body, tuple(headers)
