"""The hit path: answers a plain `GET /profiles/{user_id}` without the framework.

It answers 200 or nothing: whatever it does not recognise at a glance (an escape, an odd id, another query than
`features=`, a body, a key that is not good, trouble while reading) goes on, untouched, to the documented route, which
is the reference. `tests/api/test_hit_path.py` drives both with the same requests and demands the same answers.
Invariant: what it answers is what the documented route would have answered, request id and metrics included.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from time import perf_counter

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send
from prometheus_client import Histogram

from app.api.auth import Authenticator
from app.api.gateway import CACHE_CONTROL, NO_SNIFF, own_request_id, request_id_of
from app.api.rendering import Renderer
from app.errors import ProfilesError, UnknownFeature
from app.features.registry import Registry
from app.profiles.read import ProfileReader
from app.telemetry import REQUEST_ID, Metrics, logger

ROUTE = "/profiles/{user_id}"
_PATH = re.compile(rb"/profiles/(?!batch$|history$)([A-Za-z0-9_~@:\-][A-Za-z0-9_~@:.\-]{0,127})").fullmatch
_SELECTION = re.compile(rb"features=([A-Za-z0-9_]+(?:,[A-Za-z0-9_]+)*)").fullmatch
_OF_A_BODY = frozenset({b"content-length", b"transfer-encoding", b"expect"})
_JSON = (b"content-type", b"application/json")
_SELECTIONS_CAP = 1_024
log = logger("api")


class HitPath:
    """ASGI, around the gateway."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner
        self._reader: ProfileReader | None = None

    def open(self, reader: ProfileReader, registry: Registry, authenticator: Authenticator, metrics: Metrics) -> None:
        """From now on hits are answered here."""
        self._registry = registry
        self._template = Renderer(registry).template
        self._grants = authenticator.grants
        # Made at the first hit: a series that exists claims that something was answered.
        self._hit_seconds: Histogram | None = None
        self._request_seconds = metrics.request_seconds
        self._masks = {b"": registry.full_mask}
        self._tells = logging.getLogger().isEnabledFor(logging.DEBUG)
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == ScopeType.HTTP and scope["method"] == "GET" and self._reader is not None:
            found = _PATH(scope.get("raw_path") or b"")
            if found is not None and await self._answered(scope, found[1], self._reader, send):
                return
        await self._inner(scope, receive, send)

    async def _answered(self, scope: HTTPScope, user: bytes, reader: ProfileReader, send: Send) -> bool:
        started = perf_counter()
        mask = self._mask(scope["query_string"])
        request_id = self._admitted(scope["headers"]) if mask else None
        if request_id is None:
            return False
        user_id = user.decode()
        try:
            values = (await reader.read_values({user_id: mask}))[user_id]
        except ProfilesError:
            return False  # the documented route meets the same, and tells it properly
        except Exception:  # a defect: known by this line, and no reason not to answer
            log.exception("hit_path_failed", **{REQUEST_ID: request_id.decode()})
            return False
        body = self._template(mask) % (b'"%b"' % user, *values)
        length = (b"content-length", b"%d" % len(body))
        headers = [_JSON, length, (b"x-request-id", request_id), NO_SNIFF, CACHE_CONTROL]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        self._count(request_id, perf_counter() - started)
        return True

    def _mask(self, query: bytes) -> int:
        """The features asked for; 0 where this path cannot tell."""
        mask = self._masks.get(query)
        if mask is None:
            selection = _SELECTION(query)
            try:
                mask = self._registry.mask(selection[1].decode().split(",")) if selection is not None else 0
            except UnknownFeature:
                mask = 0
            if mask and len(self._masks) < _SELECTIONS_CAP:
                self._masks[query] = mask
        return mask

    def _admitted(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The request's id, where its key is good and it is nothing but a question."""
        key: str | None = None
        request_id: bytes | None = None
        for name, value in headers:
            if name == b"x-api-key":
                if key is not None:
                    return None
                key = value.decode("latin-1")
            elif name == b"x-request-id":
                request_id = request_id or request_id_of(value)
            elif name in _OF_A_BODY:
                return None
        if not self._grants(key, "read"):
            return None
        return request_id or own_request_id()

    def _count(self, request_id: bytes, elapsed: float) -> None:
        if self._hit_seconds is None:
            self._hit_seconds = self._request_seconds.labels("GET", ROUTE, 200)
        self._hit_seconds.observe(elapsed)
        if not self._tells:
            return
        fields = {REQUEST_ID: request_id.decode(), "method": "GET", "route": ROUTE, "status": 200}
        log.debug("request", **fields, ms=round(elapsed * 1000, 2))
