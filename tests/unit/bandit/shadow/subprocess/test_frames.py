"""Messages come out of a stream as they went in, and nothing that is not whole does."""

from __future__ import annotations

import asyncio
from io import BytesIO

from hypothesis import given
from hypothesis import strategies as st

from app.bandit.shadow.subprocess.frames import framed, next_frame, read_frame

MESSAGES = st.lists(st.binary(max_size=300), max_size=4)


async def frames_of(stream: bytes) -> list[bytes]:
    """As the event loop reads them."""
    reader = asyncio.StreamReader()
    reader.feed_data(stream)
    reader.feed_eof()
    found: list[bytes] = []
    while (message := await next_frame(reader)) is not None:
        found.append(message)
    return found


def frames_in(stream: bytes) -> list[bytes]:
    """As a file reads them."""
    file, found = BytesIO(stream), list[bytes]()
    while (message := read_frame(file)) is not None:
        found.append(message)
    return found


@given(MESSAGES)
def test_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    stream = b"".join(map(framed, messages))
    assert frames_in(stream) == messages
    assert asyncio.run(frames_of(stream)) == messages


@given(MESSAGES, st.binary(min_size=1, max_size=300), st.data())
def test_a_message_that_breaks_off_is_none(messages: list[bytes], last: bytes, data: st.DataObject) -> None:
    whole = framed(last)
    cut = data.draw(st.integers(0, len(whole) - 1))
    stream = b"".join(map(framed, messages)) + whole[:cut]
    assert frames_in(stream) == messages
    assert asyncio.run(frames_of(stream)) == messages
