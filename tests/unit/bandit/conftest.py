"""The fixture of all tests that learn."""

from __future__ import annotations

import pytest

from app.stores.sqlite.database import SqliteDatabase
from tests.support.bandit_process import BanditProcess


@pytest.fixture
async def process(database: SqliteDatabase) -> BanditProcess:
    """A process with a challenger."""
    return BanditProcess(database)
