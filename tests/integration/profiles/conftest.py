"""Worlds for the tests of the online path."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.settings.parsers import PostgresUrl
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup


@pytest.fixture
async def group(store: Path | PostgresUrl, valkey: EmbeddedServer) -> AsyncIterator[ServiceGroup]:
    async with ServiceGroup(store, valkey) as made:
        yield made


@pytest.fixture
async def fragile_world(store: Path | PostgresUrl, own_valkey: EmbeddedServer) -> AsyncIterator[ServiceGroup]:
    """On an embedded Valkey that the test may pause, kill and restart."""
    async with ServiceGroup(store, own_valkey) as made:
        yield made


@pytest.fixture
async def service(group: ServiceGroup) -> PausableService:
    return await group.open()
