"""What every request passes before and after the routes: identity, strict paths, headers, metrics, the log line.

Litestar's router decodes paths leniently; here bytes that are not UTF-8 are refused (400) and an encoded `/`, which
would make two segments of one id (422). Invariant: whatever happens behind it, a request is answered with an
`X-Request-Id`, counted once, and logged without its headers.
"""

from __future__ import annotations

import re
import secrets
from time import perf_counter
from urllib.parse import unquote_to_bytes

import structlog
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from app.api.problems import MEDIA_TYPE, encoded
from app.telemetry import REQUEST_ID, Metrics, logger

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,64}")
log = logger("api")


class Gateway:
    """ASGI, around Litestar's own handler."""

    def __init__(self, inner: ASGIApp, metrics: Metrics) -> None:
        self._inner = inner
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started = perf_counter()
        request_id = _request_id(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**{REQUEST_ID: request_id.decode()})
        status = 500

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id), (b"x-content-type-options", b"nosniff")]
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            await send(message)

        try:
            refusal = _refusal(scope)
            if refusal is None:
                await self._inner(scope, receive, send_marked)
            else:
                await _refuse(send_marked, *refusal)
        finally:
            elapsed = perf_counter() - started
            route = scope.get("path_template") or "unmatched"
            self._metrics.request_seconds.labels(scope["method"], route, status).observe(elapsed)
            level = log.error if status >= 500 else log.info if status >= 400 else log.debug
            level("request", method=scope["method"], route=route, status=status, ms=round(elapsed * 1000, 2))


def _request_id(scope: HTTPScope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8).encode()


def _refusal(scope: HTTPScope) -> tuple[int, str] | None:
    raw = scope.get("raw_path") or scope["path"].encode()
    path = raw.split(b"?", 1)[0]
    if b"%" in path:
        if b"%2f" in path.lower():
            return 422, "an id must not contain / (%2F in the path)"
        try:
            scope["path"] = unquote_to_bytes(path).decode()
        except UnicodeDecodeError:
            return 400, "the path is not UTF-8 once its percent-escapes are decoded"
    query = scope["query_string"]
    if b"%" in query or not query.isascii():
        try:
            unquote_to_bytes(query).decode()
        except UnicodeDecodeError:
            return 400, "the query is not UTF-8 once its percent-escapes are decoded"
    return None


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = encoded(status, detail)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
