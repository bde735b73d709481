"""An endpoint on loopback, and a writer that asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count

import pytest
import pytest_asyncio

from app.stores.llm.client import Endpoint, LlmClient
from app.stores.llm.writer import LlmWriter
from app.stores.system_clock import SystemClock
from tests.support.chat_server import ChatServer, chat_server

KEY = "sk-top-secret"
OpenWriter = Callable[..., AbstractAsyncContextManager[LlmWriter]]


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[ChatServer]:
    """Answers well until it is told otherwise."""
    async with chat_server() as server:
        yield server


@pytest.fixture
def open_writer() -> OpenWriter:
    """Writers that ask an address; patience by keyword."""

    @asynccontextmanager
    async def opened(
        url: str, *, connect_s: float = 1.0, patience_s: float = 5.0, least_s: float = 0.0, key: str | None = KEY
    ) -> AsyncIterator[LlmWriter]:
        exchange = LlmClient(Endpoint(url, key), connect_s=connect_s)
        marks = (f"mark{number}" for number in count())
        try:
            yield LlmWriter(exchange, "m-1", SystemClock(), lambda: next(marks), patience_s=patience_s, least_s=least_s)
        finally:
            await exchange.close()

    return opened


@pytest_asyncio.fixture
async def writer(endpoint: ChatServer, open_writer: OpenWriter) -> AsyncIterator[LlmWriter]:
    """Patient enough for a busy machine."""
    async with open_writer(endpoint.url) as opened:
        yield opened
