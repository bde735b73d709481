"""HTTP as raw bytes over a socket, for requests that no client library would send."""

import asyncio
import re
from typing import NamedTuple

from tests.support.waiting import PATIENCE_S

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
MARK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Wire(NamedTuple):
    """All bytes until the server closed the connection, and the status of each answer in them."""

    statuses: list[int]
    raw: bytes


async def exchange(port: int, sent: bytes) -> Wire:
    """Send bytes and read until the server closes the connection. Raises `TimeoutError` if it does not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b""
    try:
        async with asyncio.timeout(PATIENCE_S):
            try:
                writer.write(sent)
                await writer.drain()
                while more := await reader.read(65_536):
                    raw += more
            except ConnectionError:  # the server closed before it read everything
                pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return Wire([int(status) for status in _STATUS.findall(raw)], raw)
