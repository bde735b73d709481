"""Length-prefixed messages on a socket: a four-byte little-endian length, then the message."""

from __future__ import annotations

from asyncio import IncompleteReadError, StreamReader
from typing import BinaryIO

_LENGTH = 4


def framed(message: bytes) -> bytes:
    """The message, preceded by its length as a four-byte little-endian integer."""
    return len(message).to_bytes(_LENGTH, "little") + message


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read the next message, blocking. Return None at the end of the stream, even if a message is incomplete."""
    head = stream.read(_LENGTH)
    if len(head) < _LENGTH:
        return None
    size = int.from_bytes(head, "little")
    message = stream.read(size)
    return message if len(message) == size else None


async def next_frame(stream: StreamReader) -> bytes | None:
    """Read the next message. Return None at the end of the stream, even if a message is incomplete."""
    try:
        size = int.from_bytes(await stream.readexactly(_LENGTH), "little")
        return await stream.readexactly(size)
    except IncompleteReadError:
        return None
