"""Typed access to the objects that `app.asgi` puts into the application's state, such as the service."""

from __future__ import annotations

from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection

from app.api.auth.authentication import Authenticator
from app.api.auth.sessions import Sessions
from app.api.rendering import Renderer
from app.generation.generator import TipGenerator
from app.service import Service

HttpRequest = Request[Any, Any, Any]
Connection = ASGIConnection[Any, Any, Any, Any]


def service_of(connection: Connection) -> Service:
    return cast(Service, connection.app.state.service)


def sessions_of(connection: Connection) -> Sessions:
    return cast(Sessions, connection.app.state.sessions)


def authenticator_of(connection: Connection) -> Authenticator:
    return cast(Authenticator, connection.app.state.authenticator)


def renderer_of(connection: Connection) -> Renderer:
    return cast(Renderer, connection.app.state.renderer)


def tips_of(connection: Connection) -> TipGenerator:
    return cast(TipGenerator, connection.app.state.tips)
