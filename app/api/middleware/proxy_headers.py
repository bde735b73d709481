"""Requests that come through a proxy: the path that it shows the service under, and what it says of the client.

A proxy is believed only if the connection comes from a trusted address; anyone may send the same headers. Address and
scheme are granian's part (as uvicorn's: the last of `X-Forwarded-For` that is no trusted proxy). `Forwarded` (RFC 7239)
is not read: nginx, Traefik and AWS do not set it, so the one that they pass on is the client's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from app.settings.parsers import Network

HOST, PREFIX = b"x-forwarded-host", b"x-forwarded-prefix"


def behind_proxy(inner: ASGIApp, *, root_path: str, trusted: Sequence[Network], own: set[str]) -> ASGIApp:
    """`inner`, around which requests are put right. `own`: how the paths of the service begin."""
    if trusted:
        inner = wrap_asgi_with_proxy_headers(inner, [str(network) for network in trusted])
    return BehindProxy(inner, root_path, trusted, own) if root_path or trusted else inner


class BehindProxy:
    """ASGI, around everything else."""

    def __init__(self, inner: ASGIApp, root_path: str, trusted: Sequence[Network], own: set[str]) -> None:
        self._inner = inner
        self._root = root_path.encode()
        self._trusted = trusted
        self._own = {name.encode() for name in own}
        self._ambiguous = bool(root_path) and root_path.split("/")[1] in own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            said = self._said(scope)
            # The last one is the nearest proxy's; those before it came in with the request.
            if host := said.get(HOST, b"").rpartition(b",")[2].strip():
                scope["headers"] = [(name, host if name == b"host" else value) for name, value in scope["headers"]]
            if self._root:
                self._strip(scope, stripped=PREFIX in said)
        await self._inner(scope, receive, send)

    def _said(self, scope: HTTPScope) -> dict[bytes, bytes]:
        """The headers, if a trusted proxy sends them."""
        client = scope.get("client")
        if client is None or not self._trusted:
            return {}
        address = ipaddress.ip_address(client[0])
        if address.version == 6 and address.ipv4_mapped:  # a socket on `::` sees IPv4 clients as these
            address = address.ipv4_mapped
            scope["client"] = (str(address), client[1])
        return dict(scope["headers"]) if any(address in network for network in self._trusted) else {}

    def _strip(self, scope: HTTPScope, *, stripped: bool) -> None:
        """Take the root path off, if the proxy has passed it on.

        Under a root path like `/profiles` a stripped path, too, may begin with it. It is taken for one unless a path of
        the service remains; then `X-Forwarded-Prefix`, which a proxy sends that has stripped it, decides.
        """
        raw = scope.get("raw_path") or scope["path"].encode()
        rest = raw.removeprefix(self._root)
        if rest == raw or rest[:1] not in (b"", b"/"):
            return
        if self._ambiguous and (stripped or rest.split(b"/", 2)[1:2] not in ([name] for name in self._own)):
            return
        scope["raw_path"] = rest or b"/"
        scope["path"] = scope["path"].removeprefix(self._root.decode()) or "/"
