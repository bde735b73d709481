"""The browser of the run. All tests here share the event loop of the session, because it serves their sites."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from tests.support.browser import chromium
from tests.support.waiting import PATIENCE_S

expect.set_options(timeout=1000 * PATIENCE_S)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One Chromium for all tests of a run; each visitor has its own profile."""
    async with chromium() as started:
        yield started


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests with a browser as slow before `-m` selects."""
    if "browser" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.slow)
    if item.get_closest_marker("asyncio"):
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
