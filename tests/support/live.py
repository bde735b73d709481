"""The HTTP service on a real granian server, in the event loop of the test.

`live` serves the application on a free loopback port, with a real SQLite file, cache and queue. Tests use
`Live.service` only for operations that HTTP does not offer (run a rebuild, read the audit trail).
"""

import asyncio
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from litestar import Litestar
from litestar.types import ASGIApp

from app.api.middleware.fast_path import FastPath
from app.api.server import KEEP_ALIVE_S, GranianServer, about_to_stop
from app.asgi import create_app
from app.bootstrap.service import Edges, OpenService, open_service
from app.features.clock import Clock, SystemClock
from app.features.contract import Contract
from app.features.events import TipEvent
from app.listener import listening_socket
from app.settings import Settings, hash_key
from app.settings.parsers import ApiKey
from tests.support.database import copy_database
from tests.support.events import body
from tests.support.waiting import PATIENCE_S, eventually

KEYS = {"reader": "read-me-if-you-can", "writer": "write-it-down", "admin": "all-of-it", "stranger": "not-known-here"}
# Loading the system's certificates takes longer than most tests, and no test uses TLS here.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
JSON = {"Content-Type": "application/json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
API_KEYS = (
    ApiKey("reader", frozenset({"read"}), hash_key(KEYS["reader"])),
    ApiKey("writer", frozenset({"write"}), hash_key(KEYS["writer"])),
    ApiKey("admin", frozenset({"admin"}), hash_key(KEYS["admin"])),
)


@dataclass(frozen=True, repr=False)  # the repr of the whole service would fill every failure message
class Live:
    url: str
    port: int
    service: OpenService
    app: Litestar
    client: httpx.AsyncClient

    @property
    def cookie_name(self) -> str:
        """The name of the session cookie."""
        name: str = self.app.state.sessions.cookie_name
        return name

    @property
    def now_ms(self) -> int:
        return self.service.clock.now_ms()

    async def send(self, *events: TipEvent) -> dict[str, Any]:
        """Send events, which must be accepted; the receipt."""
        answer = await self.client.post("/events", content=body(*events), headers=JSON)
        assert answer.status_code == 202, answer.text
        receipt: dict[str, Any] = answer.json()
        return receipt

    async def features(self, user_id: str) -> dict[str, Any]:
        """Read one profile; feature name to value."""
        answer = await self.client.get(f"/profiles/{quote(user_id, safe='')}")
        assert answer.status_code == 200, answer.text
        features: dict[str, Any] = answer.json()["features"]
        return features

    async def json(self, path: str, method: str = "GET", status: int = 200, **request: Any) -> Any:
        """The JSON that answers a request, which must have this status."""
        answer = await self.client.request(method, path, **request)
        assert answer.status_code == status, answer.text
        assert answer.headers["cache-control"] == "no-store"
        return answer.json()

    async def filled(self) -> None:
        """Wait for the fills that reads have started."""
        await self.service.reader.close()


def new_user(prefix: str = "user") -> str:
    """The id of a user without events."""
    return f"{prefix}-{uuid.uuid4().hex}"


def as_caller(name: str) -> dict[str, str]:
    """The headers with one of `KEYS`."""
    return {"X-API-Key": KEYS[name]}


def fresh_database(template: Path, directory: Path) -> Path:
    """A migrated, empty database."""
    return copy_database(template, directory / f"{uuid.uuid4().hex}.db", uuid.uuid4().hex)


def problem(answer: httpx.Response, status: int, row: object = "") -> dict[str, Any]:
    """Check that an answer is a problem with this status; the problem. A failure names `row`, the row of a table."""
    request = f"{answer.request.method} {answer.request.url}"
    assert answer.status_code == status, f"{str(row)[:300]} {request[:300]}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"]
    body: dict[str, Any] = answer.json()
    assert body.keys() <= {"type", "title", "status", "detail", "errors"}
    assert body["status"] == status
    assert body["type"].startswith("urn:profiles:problem:")
    assert body["title"]
    assert body["detail"]
    return body


def paths(body: Mapping[str, Any]) -> list[str]:
    """The paths of the errors in a problem."""
    return [issue["path"] for issue in body.get("errors", [])]


def token_in(page: httpx.Response) -> str:
    """The CSRF token of the forms on a page."""
    return page.text.partition('name="csrf_token" value="')[2].partition('"')[0]


async def assert_refused(site: Live, path: str, bodies: Iterable[tuple[object, str]], status: int = 422) -> None:
    """Post each body, and check that it is refused because of one error at its place."""
    for sent, place in bodies:
        answer = await site.client.post(path, content=json.dumps(sent), headers=JSON)
        assert paths(problem(answer, status, sent)) == [place], f"{str(sent)[:300]}: {answer.text}"


async def raw_status(site: Live, target: bytes, method: bytes = b"GET") -> tuple[int, dict[str, object]]:
    """The status and body for a request target that client libraries would change."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    if int(head.split(b" ")[1]) >= 400:
        assert b"content-type: application/problem+json" in head
        assert b"x-request-id: " in head
    return int(head.split(b" ")[1]), json.loads(body)


@asynccontextmanager
async def live(
    settings: Settings,
    *,
    contract: Contract | None = None,
    clock: Clock | None = None,
    hit_path: bool = True,
    head_s: float = KEEP_ALIVE_S,
) -> AsyncIterator[Live]:
    """Serve until the block ends. Without the fast path, every request goes to its documented route."""
    async with open_service(
        settings, door="http", contract=contract, edges=Edges(clock=clock or SystemClock())
    ) as service:
        application = create_app(settings, service=service)
        door = listening_socket("127.0.0.1", 0)
        port = door.getsockname()[1]
        server = GranianServer(application, door, head_s=head_s)
        serving = asyncio.get_running_loop().create_task(server.serve())
        url = f"http://127.0.0.1:{port}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False, verify=NO_TLS) as client:
                await eventually(lambda: application.state.get("service") is not None)
                if not hit_path:
                    application.asgi_handler = behind_the_hit_path(application)
                yield Live(url, port, service, application, client)
        finally:
            about_to_stop(application)  # as `profiles serve` does
            door.close()
            server.stop()  # type: ignore[no-untyped-call]  # granian does not type it
            await serving


def behind_the_hit_path(application: Litestar) -> ASGIApp:
    """The application behind the fast path."""
    handler = application.asgi_handler
    assert isinstance(handler, FastPath)
    return handler.inner
