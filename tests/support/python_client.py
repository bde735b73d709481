"""The two forms of the Python client as one, for tests that hold for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from typing import Any

from profiles_client import Decision


class Awaited:
    """A blocking client or decision whose methods are awaited. Each runs in a thread."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        async def call(*arguments: Any, **named: Any) -> Any:
            result = await asyncio.to_thread(attribute, *arguments, **named)
            return Awaited(result) if isinstance(result, Decision) else result

        return call


@asynccontextmanager
async def opened(client: Any) -> AsyncIterator[Any]:
    """Open a client of either form; its methods are awaited."""
    if isinstance(client, AbstractAsyncContextManager):
        async with client as opened_client:
            yield opened_client
    else:
        assert isinstance(client, AbstractContextManager)
        blocking = await asyncio.to_thread(client.__enter__)
        try:
            yield Awaited(blocking)
        finally:
            await asyncio.to_thread(client.__exit__, None, None, None)
