"""HTTP/1.1: requests as bytes, and responses from bytes. httptools parses them."""

from __future__ import annotations

import re
import ssl
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import httptools

from profiles_client.errors import ConnectionLost

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch
_PATH = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:@%/]*").fullmatch


class Request(NamedTuple):
    method: str
    target: str
    body: bytes | None = None
    traceparent: str | None = None


class Response(NamedTuple):
    """An HTTP response. The names of `headers` are in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


class Transport(Protocol):
    """Sends requests to the service, and tells the time in seconds on a monotonic clock."""

    def now(self) -> float: ...

    async def pause(self, seconds: float) -> None: ...

    async def exchange(self, request: Request, deadline: float) -> Response:
        """Send a request and receive the response by `deadline`. Raises `ConnectionLost` and `DeadlineExceeded`."""

    async def close(self) -> None: ...


class Endpoint:
    """The address of the service, and the head of every request to it."""

    def __init__(self, url: str, key: str | None, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or "@" in url:
            raise ValueError(f"url: must be like http://host:8000 or https://host/prefix, not {url!r}")
        if not parts.netloc.isascii():
            raise ValueError(
                f"url: the host must be ASCII, with an international name as xn--…, not {parts.hostname!r}"
            )
        try:
            parts.hostname.encode("idna")  # as the resolver does
        except UnicodeError:
            raise ValueError(f"url: {parts.hostname!r} is not the name of a host") from None
        if parts.port == 0:
            raise ValueError("url: the port must be from 1 to 65535")
        if not _PATH(parts.path):
            raise ValueError(f"url: the path must be percent-encoded, not {parts.path!r}")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise ValueError("key: must be printable ASCII without surrounding blanks")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        credentials = f"X-API-Key: {key}\r\n" if key is not None else ""
        self._head = f" HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: profiles-client\r\n{credentials}"

    def encoded(self, request: Request) -> bytes:
        more = ""
        if request.traceparent is not None and _TRACEPARENT(request.traceparent):
            more = f"traceparent: {request.traceparent}\r\n"
        if request.body is None:
            return f"{request.method} {self._prefix}{request.target}{self._head}{more}\r\n".encode("ascii")
        more += f"Content-Type: application/json\r\nContent-Length: {len(request.body)}\r\n"
        return f"{request.method} {self._prefix}{request.target}{self._head}{more}\r\n".encode("ascii") + request.body


class ResponseReader:
    """Parses the responses of a connection, one by one. If `reusable`, the connection can carry another request."""

    def __init__(self) -> None:
        self.reusable = True
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._complete: Response | None = None
        self._unbounded = False

    def feed(self, data: bytes) -> Response | None:
        """Add received bytes. Return the response if it is complete, otherwise None. Empty `data` means that the
        service has closed the connection. This completes a response without a length, as some proxies send it. Raises
        `ConnectionLost` if the connection is closed during any other response, or if `data` is not HTTP."""
        if not data:
            if not self._unbounded:
                raise ConnectionLost("the service closed the connection before the end of its answer")
            self.reusable = False
            return Response(self._parser.get_status_code(), self._headers, b"".join(self._parts))
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionLost(f"the answer is not valid HTTP: {error}") from error
        response, self._complete = self._complete, None
        return response

    # httptools calls these.

    def on_message_begin(self) -> None:
        if self._complete is not None:  # a second response to one request
            self.reusable = False
        self._headers, self._parts = {}, []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._unbounded = not self._headers.keys() & {b"content-length", b"transfer-encoding"}

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        self._unbounded = False
        status = self._parser.get_status_code()
        if status >= 200 and self._complete is None:  # the others announce a response
            self.reusable = self.reusable and self._parser.should_keep_alive()
            self._complete = Response(status, self._headers, b"".join(self._parts))
