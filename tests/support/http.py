"""A small HTTP client for tests that send thousands of requests: one keep-alive connection on asyncio streams."""

import asyncio
import json
from time import monotonic
from typing import Any, NamedTuple

from tests.support.waiting import PATIENCE_S, eventually_async


class Broken(Exception):
    """The connection broke before the answer. The outcome of the request is unknown."""


class Refused(Broken):
    """The connection was refused. The request was not sent."""


class Answer(NamedTuple):
    status: int
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """Sends requests one after the other to one port. Connects when needed, also after the connection broke."""

    def __init__(self, port: int, key: str | None = None, *, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port
        self._key = f"X-API-Key: {key}\r\n" if key is not None else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> Answer:
        return await self._ask("GET", path, b"", "")

    async def post(self, path: str, value: object) -> Answer:
        body = json.dumps(value, default=str).encode()
        return await self._ask("POST", path, body, f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n")

    async def delete(self, path: str) -> Answer:
        return await self._ask("DELETE", path, b"", "")

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def _ask(self, method: str, path: str, body: bytes, headers: str) -> Answer:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._key}{headers}\r\n"
        return await self.send(head.encode() + body)

    async def send(self, request: bytes) -> Answer:
        """Send the bytes of a request. Raises `Broken` if it is not answered."""
        started = monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                if self._streams is None:
                    self._streams = await self._connected()
                reader, writer = self._streams
                writer.write(request)
                status, answer, last = await _response(reader)
            if last:
                await self.close()
        except (OSError, EOFError) as error:
            await self.close()
            raise Broken(f"{request.splitlines()[0]!r}: {error!r}") from error
        except BaseException:
            await self.close()
            raise
        return Answer(status, answer, monotonic() - started)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection(self.host, self.port)
        except ConnectionRefusedError as error:
            raise Refused(f"connection refused on port {self.port}") from error


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """The status, the body, and whether the server closes the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head[9:12])
    last = b"\r\nconnection: close\r\n" in head
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if not found:
        assert status == 204, head
        return status, b"", last
    return status, await reader.readexactly(int(rest[: rest.index(b"\r\n")])), last


async def serving(port: int, timeout_s: float = PATIENCE_S) -> None:
    """Wait until the port answers /healthz with 200."""
    await eventually_async(lambda: answers(port), timeout_s)


async def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether the port answers /healthz with 200."""
    connection = Connection(port, host=host)
    try:
        return (await connection.get("/healthz")).status == 200
    except Broken:
        return False
    finally:
        await connection.close()
