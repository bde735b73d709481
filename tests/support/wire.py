"""Bytes over a socket, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple

ANSWER_S = 10.0
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
MARK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Wire(NamedTuple):
    """What came back until the server closed: the status of each answer, and everything."""

    statuses: list[int]
    raw: bytes


async def exchange(port: int, sent: bytes) -> Wire:
    """Send, and read until the server closes, which it must."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            try:
                writer.write(sent)
                await writer.drain()
                while more := await reader.read(65_536):
                    raw += more
            except ConnectionError:  # closed before all of it was read
                pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return Wire([int(status) for status in _STATUS.findall(raw)], raw)
