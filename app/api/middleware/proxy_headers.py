"""Requests through a reverse proxy: the root path, and the `X-Forwarded-…` headers.

The headers are used only if the connection comes from a trusted address, because any client can send them. granian
sets the client address (the last one in `X-Forwarded-For` that is not a trusted proxy) and the scheme. `Forwarded`
(RFC 7239) is ignored: nginx, Traefik and AWS do not set this header, so they would pass on what the client sent.
"""

import ipaddress
from collections.abc import Sequence

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from app.settings.parsers import Network

HOST, PREFIX = b"x-forwarded-host", b"x-forwarded-prefix"


class BehindProxy:
    def __init__(self, inner: ASGIApp, *, root_path: str, trusted: Sequence[Network], own: set[str]) -> None:
        """`own`: the first path segment of each route, by which `_strip` recognizes a path of the service."""
        self._inner = wrap_asgi_with_proxy_headers(inner, [*map(str, trusted)]) if trusted else inner
        self._root = root_path.encode()
        self._trusted = trusted
        self._own = {name.encode() for name in own}
        self._ambiguous = bool(root_path) and root_path.split("/")[1] in own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            forwarded = self._trusted_headers(scope)
            # The last host is from the nearest proxy; the ones before it came with the request.
            if host := forwarded.get(HOST, b"").rpartition(b",")[2].strip():
                scope["headers"] = [(name, host if name == b"host" else value) for name, value in scope["headers"]]
            if self._root:
                self._strip(scope, stripped=PREFIX in forwarded)
        await self._inner(scope, receive, send)

    def _trusted_headers(self, scope: HTTPScope) -> dict[bytes, bytes]:
        """The request's headers if the connection comes from a trusted proxy, else none."""
        client = scope.get("client")
        if client is None or not self._trusted:
            return {}
        address = ipaddress.ip_address(client[0])
        if address.version == 6 and address.ipv4_mapped:  # how a socket bound to `::` reports IPv4 clients
            address = address.ipv4_mapped
            scope["client"] = (str(address), client[1])
        return dict(scope["headers"]) if any(address in network for network in self._trusted) else {}

    def _strip(self, scope: HTTPScope, *, stripped: bool) -> None:
        """Remove the root path from the beginning of the request's path, unless the proxy has removed it already.
        `stripped`: the proxy sent `X-Forwarded-Prefix`, which means that it has removed the root path.

        With the root path `/profiles`, the path `/profiles/u1` is ambiguous: routes begin with `/profiles`, too. Such a
        root path is removed only if the rest is a path of the service and `stripped` is false."""
        raw = scope.get("raw_path") or scope["path"].encode()
        rest = raw.removeprefix(self._root)
        if rest == raw or rest[:1] not in (b"", b"/"):
            return
        if self._ambiguous and (stripped or rest.split(b"/", 2)[1:2] not in ([name] for name in self._own)):
            return
        scope["raw_path"] = rest or b"/"
        scope["path"] = scope["path"].removeprefix(self._root.decode()) or "/"
