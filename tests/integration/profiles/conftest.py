"""Worlds for the tests of the online path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.service import GatedService
from tests.support.world import World


@pytest.fixture
async def world(database_path: Path, valkey: EmbeddedServer) -> AsyncIterator[World]:
    """On a shared embedded Valkey."""
    async with World(database_path, valkey) as made:
        yield made


@pytest.fixture
async def fragile_world(database_path: Path, own_valkey: EmbeddedServer) -> AsyncIterator[World]:
    """On an embedded Valkey that the test may pause, kill and restart."""
    async with World(database_path, own_valkey) as made:
        yield made


@pytest.fixture
async def service(world: World) -> GatedService:
    """One process in that world."""
    return await world.open()
