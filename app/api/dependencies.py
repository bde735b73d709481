"""What handlers need of a request: the objects that `app.asgi` puts into the application's state, such as the service,
and whether the client is still connected.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection

from app.api.auth.authentication import Authenticator
from app.api.auth.sessions import Sessions
from app.api.rendering import Renderer
from app.generation.generator import TipGenerator
from app.service import Service
from app.settings.parsers import ApiKey

HttpRequest = Request[Any, Any, Any]
Connection = ASGIConnection[Any, Any, Any, Any]


def service_of(connection: Connection) -> Service:
    return cast(Service, connection.app.state.service)


def caller(connection: Connection) -> ApiKey:
    """The API key that the request was sent with; `ANYONE` if no keys are configured."""
    return cast(ApiKey, connection.scope["user"])


def sessions_of(connection: Connection) -> Sessions:
    return cast(Sessions, connection.app.state.sessions)


def authenticator_of(connection: Connection) -> Authenticator:
    return cast(Authenticator, connection.app.state.authenticator)


def renderer_of(connection: Connection) -> Renderer:
    return cast(Renderer, connection.app.state.renderer)


def tips_of(connection: Connection) -> TipGenerator:
    return cast(TipGenerator, connection.app.state.tips)


@asynccontextmanager
async def cancelled_on_disconnect(request: HttpRequest) -> AsyncIterator[None]:
    """Cancel the current task if the client disconnects inside the block. A body that is not read before is lost."""
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
