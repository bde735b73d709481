"""A chat-completions endpoint on loopback, and a writer that calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count

import pytest
import pytest_asyncio

from app.features.clock import SystemClock
from app.stores.llm import LlmWriter
from tests.support.chat_server import ChatServer, chat_server

KEY = "sk-top-secret"
OpenWriter = Callable[..., AbstractAsyncContextManager[LlmWriter]]


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[ChatServer]:
    async with chat_server() as server:
        yield server


@pytest.fixture
def open_writer() -> OpenWriter:
    """Opens a writer for a URL, with timeouts by keyword."""

    @asynccontextmanager
    async def opened(
        url: str, *, connect_s: float = 1.0, patience_s: float = 5.0, least_s: float = 0.0, key: str | None = KEY
    ) -> AsyncIterator[LlmWriter]:
        times = {"connect_s": connect_s, "patience_s": patience_s, "least_s": least_s}
        marks = (f"mark{number}" for number in count())
        writer = LlmWriter(url, "m-1", SystemClock(), lambda: next(marks), key=key, **times)
        try:
            yield writer
        finally:
            await writer.close()

    return opened


@pytest_asyncio.fixture
async def writer(endpoint: ChatServer, open_writer: OpenWriter) -> AsyncIterator[LlmWriter]:
    async with open_writer(endpoint.url) as opened:
        yield opened
