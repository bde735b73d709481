"""One request to a chat-completions endpoint and its answer, within bounds.

Invariants: an answer is read up to `MOST_BYTES` and as it was sent (a small compressed body may be a large one); a
redirect is not followed, for it would take prompt and key elsewhere; nothing of the environment is used. A proxy's
variable or a `.netrc` made for other programs must not decide who sees the prompt and which key is sent; whoever needs
a proxy names it as the endpoint. The key stands in one header and nowhere else; whether an endpoint repeats it,
`holds_key` tells.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, NamedTuple

import httpx

from app.errors import ModelFailed

CONNECT_S = 2.0
MOST_BYTES = 64 * 1024
SECRET_CHARS = 16  # servers of one's own take any key, and are given a word


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is asked. `url` is the base that `/chat/completions` is put behind."""

    url: str
    key: str | None = field(default=None, repr=False)


class Reply(NamedTuple):
    """An answer; `retry_after` is the header as it came."""

    status: int
    body: bytes
    retry_after: str | None


class NotConnected(ModelFailed):
    """No answer began: the request may be sent again."""


class LlmClient:
    """Sends requests to one endpoint. To be closed."""

    def __init__(self, endpoint: Endpoint, *, connect_s: float = CONNECT_S) -> None:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if endpoint.key is not None:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        self._secret = endpoint.key if endpoint.key is not None and len(endpoint.key) >= SECRET_CHARS else None
        self._url = f"{endpoint.url}/chat/completions"
        self._client = httpx.AsyncClient(
            headers=headers,
            # The caller has a deadline for the whole answer; a limit per read would let a trickle go on for ever.
            timeout=httpx.Timeout(None, connect=connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            follow_redirects=False,
            event_hooks={"response": [_stay_here]},
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # kept, they would pile up
            verify=_tls(endpoint.url),
        )

    async def post(self, body: dict[str, Any]) -> Reply:
        """Send a request; the answer, whatever its status.

        Raises:
            NotConnected: no connection, or it broke before an answer began.
            ModelFailed: it broke within the answer, or the answer is too much.
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
            # Its kind and not its text: what is not HTTP is told with what stood there instead.
            kind = type(error).__name__
            if begun:
                raise ModelFailed("connection failed", f"the connection broke within the answer ({kind})") from None
            raise NotConnected("connection failed", f"no answer began ({kind})") from None

    def holds_key(self, text: str) -> bool:
        """Whether a text repeats the key that is sent along."""
        return self._secret is not None and self._secret in text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


async def _stay_here(response: httpx.Response) -> None:
    """Forget where a redirect leads: the client would look at it all the same, and fail at what is no address."""
    response.headers.pop("location", None)


def _tls(url: str) -> ssl.SSLContext:
    """Certificates of the public authorities and of the system's own store, which may name a company's."""
    if not url.startswith("https:"):
        return ssl.SSLContext(
            ssl.PROTOCOL_TLS_CLIENT
        )  # of no use, and without the tens of milliseconds of loading them
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context
