"""The service as processes: a fleet over a cache and a queue that the test may kill."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from arq.connections import ArqRedis

from app.settings.parsers import PostgresUrl
from tests.support.fleet import Fleet
from tests.support.processes import Programs
from tests.support.queue import connect
from tests.support.servers import VALKEY, StartServer


@pytest.fixture
def fleet(programs: Programs, store: Path | PostgresUrl, start_server: StartServer) -> Iterator[Fleet]:
    """An empty database, a cache and a queue of this test's own; no process yet."""
    cache, queue = start_server(VALKEY), start_server(VALKEY, options=("--appendonly", "yes"))
    yield Fleet(programs, store, cache, queue)
    programs.close()  # before the servers, so that no process waits for them
    cache.kill()
    queue.kill()


@pytest.fixture
async def queue(fleet: Fleet) -> AsyncIterator[ArqRedis]:
    """A client of the fleet's queue."""
    client = connect(fleet.queue.url)
    yield client
    await client.aclose(close_connection_pool=True)
