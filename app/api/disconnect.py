"""Work that ends when its client hangs up: for requests that may compute for seconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.api.dependencies import HttpRequest


@asynccontextmanager
async def cancelled_on_disconnect(request: HttpRequest) -> AsyncIterator[None]:
    """Cancel the request's task if the client disconnects inside the block. The body must have been read before."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
