"""Every interleaving that the protocol excludes, forced on both servers; and proof that the schedules can fail."""

from pathlib import Path

import pytest

from app.settings.parsers import PostgresUrl
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.schedules import Schedule, caught, on_own_server, on_shared_server
from tests.support.servers import StartServer
from tests.support.service_group import Kind, ServiceGroup

pytestmark = pytest.mark.both_engines


def _name(value: Schedule | Kind) -> str:
    return value.name if isinstance(value, Kind) else getattr(value, "__name__", repr(value))


@pytest.mark.parametrize("schedule", on_shared_server, ids=_name)
async def test_reads_are_right_in_forced_interleavings(
    schedule: Schedule, server: EmbeddedServer, store: Path | PostgresUrl
) -> None:
    async with ServiceGroup(store, server) as group:
        await schedule(group)


@pytest.mark.parametrize("schedule", on_own_server, ids=_name)
async def test_reads_are_right_when_the_server_restarts(
    schedule: Schedule, own_server: EmbeddedServer, store: Path | PostgresUrl
) -> None:
    async with ServiceGroup(store, own_server) as group:
        await schedule(group)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "mutant"), caught, ids=_name)
async def test_stale_read_is_found_when_the_cache_is_broken(
    schedule: Schedule, mutant: Kind, start_server: StartServer, store: Path | PostgresUrl
) -> None:
    server = start_server("valkey")
    async with ServiceGroup(store, server, mutant) as group:
        with pytest.raises(AssertionError, match="differs from a recomputation"):
            await schedule(group)
    server.kill()
