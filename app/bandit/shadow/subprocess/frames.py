"""Messages on a pipe: each after its length, four bytes."""

from __future__ import annotations

from asyncio import IncompleteReadError, StreamReader
from typing import BinaryIO

_LENGTH = 4


def framed(message: bytes) -> bytes:
    """As it goes into the pipe."""
    return len(message).to_bytes(_LENGTH, "little") + message


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end, also where it comes in the middle of one."""
    head = stream.read(_LENGTH)
    if len(head) < _LENGTH:
        return None
    size = int.from_bytes(head, "little")
    message = stream.read(size)
    return message if len(message) == size else None


async def next_frame(stream: StreamReader) -> bytes | None:
    """The same, on the event loop."""
    try:
        size = int.from_bytes(await stream.readexactly(_LENGTH), "little")
        return await stream.readexactly(size)
    except IncompleteReadError:
        return None
