"""What handlers need of a request: the state of the application, the caller, and whether the client is connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

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


class State(Protocol):
    """The application's state, which `app.asgi` sets."""

    service: Service
    sessions: Sessions
    authenticator: Authenticator
    renderer: Renderer
    tips: TipGenerator


def state_of(connection: Connection) -> State:
    return cast(State, connection.app.state)


def service_of(connection: Connection) -> Service:
    return state_of(connection).service


def caller(connection: Connection) -> ApiKey:
    """The API key that the request was sent with; `ANYONE` if no keys are configured."""
    return cast(ApiKey, connection.scope["user"])


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
