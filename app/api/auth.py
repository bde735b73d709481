"""API keys and scopes.

A key is known only by its SHA-256. Every configured digest is compared, in constant time, so the time taken tells
nothing about which one was near. Without any key everyone may do everything; settings allow that on loopback only.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any, NamedTuple

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.errors import Forbidden, Unauthenticated
from app.settings import ApiKey, hash_key

HEADER = "x-api-key"
MAX_KEY_LENGTH = 512


class Caller(NamedTuple):
    """Who asks: the key's name, and what it may do."""

    name: str
    scopes: frozenset[str]


ANYONE = Caller("anyone", frozenset({"read", "write", "admin"}))


class Authenticator:
    """Tells callers by their key."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple((key.sha256, _caller(key)) for key in keys)

    def caller(self, key: str | None) -> Caller:
        """Who this key belongs to.

        Raises:
            Unauthenticated: there is none, or it is not known.
        """
        found = self._found(key)
        if found is None:
            if key is None:
                raise Unauthenticated("this service needs a key: send it in the header X-API-Key")
            raise Unauthenticated("the key in X-API-Key is not known")
        return found

    def require(self, key: str | None, scope: str) -> Caller:
        """The caller, who has `scope`; raises `Unauthenticated` or `Forbidden`."""
        caller = self.caller(key)
        if scope not in caller.scopes:
            raise Forbidden(f"the key {caller.name!r} has not the scope {scope!r}")
        return caller

    def grants(self, key: str | None, scope: str) -> bool:
        """Whether `require` would return."""
        found = self._found(key)
        return found is not None and scope in found.scopes

    def _found(self, key: str | None) -> Caller | None:
        if not self._keys:
            return ANYONE
        if key is None:
            return None
        digest = hash_key(key[:MAX_KEY_LENGTH])
        found: Caller | None = None
        for known, caller in self._keys:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def _caller(key: ApiKey) -> Caller:
    return Caller(key.name, key.scopes | {"read", "write"} if "admin" in key.scopes else key.scopes)


def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar's guard: the scope that a route names in its `opt` is required."""
    scope = handler.opt.get("scope")
    if scope is not None:
        api = connection.app.state.api
        connection.scope["user"] = api.authenticator.require(connection.headers.get(HEADER), scope)
