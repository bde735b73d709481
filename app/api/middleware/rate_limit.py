"""A limit on the requests of each caller: a token bucket for each key, in this process alone. Off unless it is set.

A caller without a key that is known counts by the address it comes from, so that who guesses keys is slowed down and
does not use up what others may send. Probes and Prometheus are not limited. Each answer says what is left, after
draft-ietf-httpapi-ratelimit-headers-09. Invariants: in no stretch of time does a caller get more than the burst and
what has come in since; who waits as long as `Retry-After` says is let in, if no other client uses the same key.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from app.api.auth.authentication import Authenticator
from app.telemetry import Metrics

PEERS = 10_000
NOT_LIMITED = frozenset({"/healthz", "/readyz", "/metrics"})
_MARK = "rate_limited"


class RateLimitDecision(NamedTuple):
    """Whether a request may be carried out; how many more may follow at once, and when (`wait_s`) the next one may."""

    allowed: bool
    left: int
    wait_s: float
    full_s: float


class TokenBuckets:
    """By name of the caller. One that was not heard of, or not for long, has a full bucket."""

    def __init__(self, per_s: float, burst: int, now: Callable[[], float]) -> None:
        self.burst = burst
        self.per_s = per_s
        self._now = now
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> RateLimitDecision:
        """One request of this caller."""
        now = self._now()
        tokens, at = self._held.pop(name, (float(self.burst), now))
        tokens = min(self.burst, tokens + max(0.0, now - at) * self.per_s)
        allowed = tokens >= 1
        if allowed:
            tokens -= 1
        self._held[name] = tokens, now
        if len(self._held) > PEERS:
            self._held.popitem(last=False)  # who has been silent for longest
        wait_s = max(0.0, (1 - tokens) / self.per_s)
        return RateLimitDecision(allowed, int(tokens), wait_s, (self.burst - tokens) / self.per_s)


class RateLimit:
    """ASGI, around everything else."""

    def __init__(self, inner: ASGIApp, refuse: ASGIApp, per_s: int, burst: int, metrics: Metrics) -> None:
        """`refuse` answers what is marked as limited. A `burst` of 0 is what comes in within a second."""
        self._inner = inner
        self._refuse = refuse
        self._per_s = per_s
        self._burst = burst or per_s
        self._limited = metrics.rate_limited
        self._buckets: TokenBuckets | None = None
        window_s = math.ceil(self._burst / per_s)
        self._policy = (b"ratelimit-policy", b'"requests";q=%d;w=%d' % (self._burst, window_s))

    def open(self, authenticator: Authenticator, now: Callable[[], float]) -> None:
        """From now on requests are limited."""
        self._name_of = authenticator.name_of
        self._buckets = TokenBuckets(self._per_s, self._burst, now)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or self._buckets is None or scope["path"] in NOT_LIMITED:
            await self._inner(scope, receive, send)
            return
        key = next((value for name, value in scope["headers"] if name == b"x-api-key"), None)
        name = self._name_of(key.decode("latin-1")) if key is not None else None
        verdict = self._buckets.take(f"key {name}" if name is not None else f"peer {_peer(scope)}")
        headers = [self._policy, (b"ratelimit", b'"requests";r=%d;t=%d' % (verdict.left, math.ceil(verdict.full_s)))]
        if not verdict.allowed:
            self._limited.labels(name or "without a key").inc()
            cast(dict[str, Any], scope)[_MARK] = True
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(verdict.wait_s))))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        # Who may not is refused by the gateway, which takes the body in, counts and logs.
        await (self._inner if verdict.allowed else self._refuse)(scope, receive, send_marked)


def is_limited(scope: HTTPScope) -> bool:
    """Whether this request is one too many."""
    return _MARK in scope


def _peer(scope: HTTPScope) -> str:
    client = scope.get("client")
    return client[0][:64] if client else ""  # longer than any address; a forwarded one may be any text
