"""An HTTP client for a chat-completions endpoint.

Invariants:
- At most `MOST_BYTES` of an answer are read. Compression is not accepted, because a small compressed body could expand
  to a large one.
- A redirect is not followed: it would send prompt and key to another address.
- Proxy variables and `.netrc` are ignored: the settings of other programs must not decide which server gets the prompt
  and which key is sent. An operator who needs a proxy sets the URL of the proxy as the endpoint.
- The key is sent in one header only; `holds_key` tells whether an answer repeats the key.
"""

from __future__ import annotations

import ssl
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NamedTuple

import httpx

from app.errors import ModelFailed

CONNECT_S = 2.0
MOST_BYTES = 64 * 1024
SECRET_CHARS = 16  # shorter keys are placeholders for a local server that accepts any key


class Reply(NamedTuple):
    """An HTTP answer, whatever its status. `retry_after` is the raw `Retry-After` header; None if it is missing."""

    status: int
    body: bytes
    retry_after: str | None


class NotConnected(ModelFailed):
    """The connection failed before an answer began, so the request may be sent again."""


class LlmClient:
    def __init__(self, url: str, key: str | None = None, *, connect_s: float = CONNECT_S) -> None:
        """`/chat/completions` is appended to `url`, the base URL. `connect_s`: seconds allowed for connecting."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._secret = key if key is not None and len(key) >= SECRET_CHARS else None
        self._url = f"{url}/chat/completions"
        self._client = httpx.AsyncClient(
            headers=headers,
            # The caller has a deadline for the whole answer. A limit per read would never end a slow trickle.
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
            event_hooks={"response": [_remove_location]},
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # cookies would accumulate
            verify=_tls(url),
        )

    async def post(self, body: dict[str, Any]) -> Reply:
        """Send `body` as JSON and return the answer, whatever its status.

        Raises:
            NotConnected: no connection was made, or it broke before an answer began.
            ModelFailed: the connection broke within the answer, or the answer has more than `MOST_BYTES`.
        """
        begun = False
        try:
            async with self._client.stream("POST", self._url, json=body) as response:
                begun = True
                taken = bytearray()
                async for piece in response.aiter_raw():
                    taken += piece
                    if len(taken) > MOST_BYTES:
                        raise ModelFailed("invalid answer", f"the answer has more than {MOST_BYTES} bytes")
                return Reply(response.status_code, bytes(taken), response.headers.get("retry-after"))
        except httpx.ConnectTimeout:
            raise NotConnected("timeout", "no connection in time") from None
        except httpx.HTTPError as error:
            # The type and not the text, which for invalid HTTP contains bytes of the answer.
            kind = type(error).__name__
            if begun:
                raise ModelFailed("connection failed", f"the connection broke within the answer ({kind})") from None
            raise NotConnected("connection failed", f"no answer began ({kind})") from None

    def holds_key(self, text: str) -> bool:
        """Whether a text contains the API key. False for a key of fewer than `SECRET_CHARS` characters, or none."""
        return self._secret is not None and self._secret in text

    async def close(self) -> None:
        await self._client.aclose()


async def _remove_location(response: httpx.Response) -> None:
    """Remove the `Location` header: httpx, though it follows no redirect, fails if this header is not a URL."""
    response.headers.pop("location", None)


def _tls(url: str) -> ssl.SSLContext:
    """A TLS context that trusts the public certificate authorities and those installed on the system."""
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; loading certificates takes tens of milliseconds
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context
