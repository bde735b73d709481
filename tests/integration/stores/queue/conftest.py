"""A client of arq and the service's queue on one empty server."""

from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis

from app.stores.queue.client import Queue
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.queue import connect


@pytest.fixture
async def client(valkey: EmbeddedServer) -> AsyncIterator[ArqRedis]:
    connected = connect(valkey.url)
    yield connected
    await connected.aclose(close_connection_pool=True)


@pytest.fixture
async def published(valkey: EmbeddedServer) -> AsyncIterator[Queue]:
    opened = Queue(valkey.url, Metrics())
    yield opened
    await opened.close()
