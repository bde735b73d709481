"""Fixtures of the tests of cache connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.connections import Connections
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.caches import valkey_cache
from tests.support.proxy import Proxy, proxy

OpenCache = Callable[..., Awaitable[ValkeyCache]]
Connect = Callable[..., Connections]


@pytest.fixture
async def valkey_proxy(valkey: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with proxy(valkey.socket_path) as opened:
        yield opened


@pytest.fixture
async def open_cache() -> AsyncIterator[OpenCache]:
    """Open caches as `valkey_cache` does; they are closed after the test."""
    opened: list[ValkeyCache] = []

    async def open_one(server: EmbeddedServer | None = None, **options: Any) -> ValkeyCache:
        opened.append(await valkey_cache(server, **options))
        return opened[-1]

    yield open_one
    for cache in opened:
        await cache.close()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Open connections to a URL; they are closed after the test."""
    opened: list[Connections] = []

    def open_one(url: str, timeout_s: float = 5) -> Connections:
        opened.append(Connections(url, timeout_s))
        return opened[-1]

    yield open_one
    for connections in opened:
        await connections.close()
