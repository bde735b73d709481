"""What handlers need of a request: the parts of the application, the caller, and whether the client is connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

from litestar import Request

from app.api.auth.authentication import Authenticator
from app.api.auth.sessions import Sessions
from app.api.rendering import Renderer
from app.generation.generator import TipGenerator
from app.service import Service
from app.settings.parsers import ApiKey


class Parts(Protocol):
    """The application's state, which `app.asgi` sets."""

    service: Service
    sessions: Sessions
    authenticator: Authenticator
    renderer: Renderer
    tips: TipGenerator


class HttpRequest(Request[ApiKey, Any, Any]):
    """A request. `user` is the API key that it was sent with; `ANYONE` if no keys are configured."""

    @property
    def parts(self) -> Parts:
        return cast(Parts, self.app.state)

    @property
    def service(self) -> Service:
        return self.parts.service


@asynccontextmanager
async def cancelled_on_disconnect(request: HttpRequest) -> AsyncIterator[None]:
    """Cancel the current task if the client disconnects in the block. Read the body first: unread parts are lost."""
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
