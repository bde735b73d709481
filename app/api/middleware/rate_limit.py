"""Rate limit: a token bucket per key, in this process. Off unless `PROFILES_RATE_LIMIT` is set.

Requests without a known key use the bucket of their client address. So guessing keys is slow, and does not slow down
callers with a key. Probes and `/metrics` are not limited. The headers follow draft-ietf-httpapi-ratelimit-headers-09.
Invariants: over any period a caller gets at most the burst plus the rate times the period; a caller that waits for
`Retry-After` is admitted, if no other client uses the same key.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.api.auth.authentication import ANYONE, Authenticator
from app.api.middleware.edge import Edge
from app.telemetry import Metrics

CALLERS = 10_000  # buckets kept
NOT_LIMITED = frozenset({"/healthz", "/readyz", "/metrics"})
LIMITED = 429, "too many requests with this key or from this address; retry after the seconds in Retry-After"


class TokenBuckets(msgspec.Struct):
    """Token buckets, one per caller. The first bucket of a caller is full, as is a new one after an eviction."""

    per_s: float
    burst: int
    now: Callable[[], float]
    _held: OrderedDict[str, tuple[float, float]] = msgspec.field(default_factory=OrderedDict)

    def take(self, name: str) -> tuple[bool, float]:
        """Take a token from a caller's bucket, if it has one. Return whether a token was taken, and the number left."""
        now = self.now()
        tokens, at = self._held.pop(name, (float(self.burst), now))
        tokens = min(self.burst, tokens + max(0.0, now - at) * self.per_s)
        allowed = tokens >= 1
        if allowed:
            tokens -= 1
        self._held[name] = tokens, now
        if len(self._held) > CALLERS:
            self._held.popitem(last=False)  # the least recently used
        return allowed, tokens


class RateLimit:
    def __init__(
        self, inner: ASGIApp, edge: Edge, buckets: TokenBuckets, authenticator: Authenticator, metrics: Metrics
    ) -> None:
        """Requests over the limit go to `edge`, which reads their bodies, and rejects, counts and logs them."""
        self._inner = inner
        self._edge = edge
        self._buckets = buckets
        self._find = authenticator.find
        self._limited = metrics.rate_limited
        window_s = math.ceil(buckets.burst / buckets.per_s)
        self._policy = (b"ratelimit-policy", b'"requests";q=%d;w=%d' % (buckets.burst, window_s))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or scope["path"] in NOT_LIMITED:
            await self._inner(scope, receive, send)
            return
        key = next((value for name, value in scope["headers"] if name == b"x-api-key"), None)
        caller = self._find(key.decode("latin-1")) if key is not None else None
        name = caller.name if caller is not None and caller is not ANYONE else None
        peer = (scope.get("client") or ("",))[0][:64]  # longer than any address; a forwarded address may be any text
        allowed, tokens = self._buckets.take(f"key {name}" if name is not None else f"peer {peer}")
        full_s = math.ceil((self._buckets.burst - tokens) / self._buckets.per_s)
        headers = [self._policy, (b"ratelimit", b'"requests";r=%d;t=%d' % (int(tokens), full_s))]
        if not allowed:
            self._limited.labels(name or "without a key").inc()
            headers.append((b"retry-after", b"%d" % max(1, math.ceil((1 - tokens) / self._buckets.per_s))))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        if allowed:
            await self._inner(scope, receive, send_marked)
        else:
            await self._edge.answer(scope, receive, send_marked, LIMITED)
