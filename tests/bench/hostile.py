"""How long one anonymous request can block the event loop: hostile heads and bodies of the largest accepted size.

The measure is the processor time of the loop's thread from the call of the application to its answer. The service has
keys, and the requests have none.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from time import thread_time
from typing import Any, NamedTuple

from litestar import Litestar
from litestar._parsers import parse_cookie_string, parse_query_string, parse_url_encoded_form_data

from app.api.auth.authentication import names_this_machine
from app.api.middleware.edge import MAX_HEADER_BYTES, MAX_TARGET_BYTES
from app.api.server import HEAD_BYTES
from app.asgi import MAX_BODY_BYTES, create_app
from app.bootstrap.service import open_service
from app.settings import Settings
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.support.live import API_KEYS

AIM_S = 0.02
TRIES = 3  # the fastest counts, because other load can only make it slower
HEADERS = (
    "accept", "accept-language", "accept-encoding", "authorization", "content-type", "content-encoding", "cookie",
    "expect", "forwarded", "host", "if-none-match", "if-modified-since", "last-event-id", "origin", "range", "referer",
    "sec-fetch-site", "user-agent", "x-anything", "x-api-key", "x-csrf-token", "x-forwarded-for", "x-forwarded-host",
    "x-forwarded-prefix", "x-forwarded-proto",
    "x-request-id",
)  # fmt: skip
PATTERNS = (
    b"\\", b'"', b'\\"', b"\\101", b",", b";", b"a=b;", b"profiles_a=;", b"*/*,", b"a/b;q=1,", b"a/b;a=b;c=d,", b"en,",
    b'W/"a",', b"0-1,", b"=", b"a", b"9", b" ", b"\t", b"/", b"a/", b".", b"../", b":", b"[", b"{a:str}/", b"%41", b"%",
    b"+", b"&", b"a&", b"a=1&", b"charset =", b"127.0.0.1,", b"\xff",
)  # fmt: skip
HEAD_ROUTES = (
    "/admin", "/admin/users/x", "/admin/nothing", "/admin/sign-in", "/profiles/x", "/healthz", "/metrics", "/nothing"
)  # fmt: skip
TARGETS = ("/", "/profiles/", "/admin/", "/admin/users/", "/admin/assets/", "/schema/")
BODY_ROUTES = ("/events", "/profiles/batch", "/score", "/admin/rebuilds", "/admin/sign-in", "/nothing")
MEDIA_TYPES = (
    b"application/json",
    b"application/x-ndjson",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data; boundary=a",
)
BODY_PATTERNS = (
    b"[",
    b'{"a":',
    b"9",
    b"[],",
    b"\\u0041",
    b"\n",
    b"{}\n",
    b"a&",
    b"%41",
    b"csrf_token=%41&",
    b"--a\r\n\r\n",
)
BODY_SIZES = (16 * 1024, MAX_BODY_BYTES)


CACHES = (parse_cookie_string, parse_query_string, parse_url_encoded_form_data, names_this_machine)


class Request(NamedTuple):
    name: str
    method: str
    path: bytes
    query: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    body: bytes = b""


def filled(pattern: bytes, size: int) -> bytes:
    """`size` bytes of a repeated pattern."""
    return (pattern * (size // len(pattern) + 1))[:size]


def heads(routes: Sequence[str] = HEAD_ROUTES) -> Iterator[Request]:
    """Single headers of the largest accepted size and beyond, many headers, and long targets."""
    quoted = b'profiles_session="%b"'
    for name in HEADERS:
        for pattern in PATTERNS:
            values = [filled(pattern, size) for size in (MAX_HEADER_BYTES, HEAD_BYTES)]
            if name == "cookie":
                values += [quoted % filled(pattern, size) for size in (MAX_HEADER_BYTES - 20, HEAD_BYTES)]
            lines = [[(name.encode(), value)] for value in values]
            lines.append(lines[0] * (2 * HEAD_BYTES // MAX_HEADER_BYTES - 1))
            for route in routes:
                # The header that chooses between a page and JSON is parsed, too.
                page = [] if name == "accept" else [(b"accept", b"text/html")]
                for line in lines:
                    called = f"{len(line)} × {name} of {len(line[0][1]):,} bytes of {pattern!r}, GET {route}"
                    yield Request(called, "GET", route.encode(), headers=[*line, *page])
    yield from targets(routes)


def targets(routes: Sequence[str]) -> Iterator[Request]:
    """Queries and paths of the largest accepted size, and beyond."""
    for pattern in PATTERNS:
        for size in (MAX_TARGET_BYTES - 20, HEAD_BYTES):
            text = filled(pattern, size)
            for route in (*routes, "/schema"):
                for query in (text, b"features=" + text, b"next=" + text):
                    yield Request(f"{size:,} bytes of {pattern!r} as query, GET {route}", "GET", route.encode(), query)
            for target in TARGETS:
                yield Request(f"{size:,} bytes of {pattern!r} after {target}", "GET", target.encode() + text)


def bodies() -> Iterator[Request]:
    """Each kind of body, to routes that read one and to others."""
    for pattern in BODY_PATTERNS:
        for size in BODY_SIZES:
            body = filled(pattern, size)
            for route in BODY_ROUTES:
                for kind in MEDIA_TYPES:
                    headers = [(b"content-type", kind), (b"content-length", str(size).encode())]
                    name = f"{size:,} bytes of {pattern!r} as {kind.decode()}, POST {route}"
                    yield Request(name, "POST", route.encode(), headers=headers, body=body)


async def answered(application: Litestar, request: Request) -> tuple[int, float]:
    """The status, and the processor time of the loop."""
    scope: Any = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method, "scheme": "http",
        "path": request.path.decode("latin-1"), "raw_path": request.path, "query_string": request.query,
        "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "extensions": {}, "state": {},
    }  # fmt: skip
    own_host = any(name == b"host" for name, _ in request.headers)
    scope["headers"] = [*request.headers, *([] if own_host else [(b"host", b"localhost")])]
    parts = [request.body[at : at + HEAD_BYTES] for at in range(0, len(request.body), HEAD_BYTES)] or [b""]
    left = iter(range(len(parts) - 1, -1, -1))
    status = 0

    async def receive() -> Any:
        if (more := next(left, None)) is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts[-1 - (more or 0)], "more_body": bool(more)}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    for cached in CACHES:  # real requests would differ each time
        cached.cache_clear()
    started = thread_time()
    await application(scope, receive, send)
    return status, thread_time() - started


async def slowest(application: Litestar, requests: Iterator[Request]) -> tuple[float, str]:
    """The time and the description of the slowest request. Raises `AssertionError` if one is answered with 5xx."""
    worst, name = 0.0, ""
    for request in requests:
        status, seconds = 0, float("inf")
        for _ in range(TRIES):
            status, taken = await answered(application, request)
            assert status < 500, (status, request.name)
            seconds = min(seconds, taken)
            if seconds <= worst:
                break
        if seconds > worst:
            worst, name = seconds, f"{request.name}: {status}"
    return worst, name


@asynccontextmanager
async def application_of(settings: Settings) -> AsyncIterator[Litestar]:
    """A service with keys in this process, which trusts the headers of a proxy on this machine."""
    settings = replace(settings, api_keys=API_KEYS, trusted_proxies=(ip_network("127.0.0.1"),))
    async with open_service(settings, door="http") as service:
        application = create_app(settings, service=service)
        async with application.lifespan():
            gc.freeze()  # as the service does
            yield application


def measure(environment: Environment) -> Iterator[Comparison]:
    async def run() -> list[tuple[float, str]]:
        async with application_of(environment.settings) as application:
            return [await slowest(application, requests) for requests in (heads(), bodies())]

    for kind, (seconds, name) in zip(("head", "body"), asyncio.run(run()), strict=True):
        yield Comparison(f"event loop, worst anonymous {kind} ({name})", "the aim", AIM_S, seconds, 1.0)
