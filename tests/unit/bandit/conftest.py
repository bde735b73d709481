"""The fixture of all tests that learn."""

import pytest

from app.stores.sql.database import Database
from tests.support.bandit_process import BanditProcess


@pytest.fixture
async def process(database: Database) -> BanditProcess:
    """A process with a challenger."""
    return BanditProcess(database)
