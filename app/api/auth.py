"""API keys and scopes, and who is let in.

A key is known only by its SHA-256. Every configured digest is compared, in constant time, so the time taken tells
nothing about which one was near. Without any key everyone may do everything; settings allow that on loopback only.
An admin in a browser comes with a session instead of a key (`app.api.sessions`). Invariant: nothing is changed on the
word of a cookie alone, or of the mere fact that a browser stands on this machine: a form carries its session's token,
any other request of a session carries it in a header, and what a browser sends from another site is refused. Nor is a
site believed to be this machine because its name leads here.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.api.forms import TOKEN_FIELD, is_form, read_form
from app.api.sessions import COOKIE, Session
from app.errors import Forbidden, Unauthenticated
from app.setting_values import ApiKey
from app.settings import hash_key, is_loopback

HEADER = "x-api-key"
TOKEN_HEADER = "x-csrf-token"  # noqa: S105  # its name
MAX_KEY_LENGTH = 512
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Caller(NamedTuple):
    """Who asks: the key's name, and what it may do."""

    name: str
    scopes: frozenset[str]


ANYONE = Caller("anyone", frozenset({"read", "write", "admin"}))


class Authenticator:
    """Tells callers by their key."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple((key.sha256, _caller(key)) for key in keys)

    @property
    def keyless(self) -> bool:
        """Whether everyone may do everything."""
        return not self._keys

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

    def named(self, name: str) -> Caller | None:
        """The caller whose key has that name; for sessions, which have shown it already."""
        return next((caller for _, caller in self._keys if caller.name == name), None)

    def name_of(self, key: str) -> str | None:
        """The name of the key, where it is one that is known."""
        found = self._found(key)
        return found.name if found is not None and found is not ANYONE else None

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


async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar's guard: the scope that a route names in its `opt` is required. `form`: it takes a form from anybody."""
    scope = handler.opt.get("scope")
    if scope is None and not handler.opt.get("form"):
        return
    changes = connection.scope["method"] not in _SAFE  # type: ignore[typeddict-item]  # every connection is HTTP here
    if changes:
        _refuse_other_sites(connection)
    authenticator: Authenticator = connection.app.state.api.authenticator
    if authenticator.keyless and not names_this_machine(connection.headers.get("host")):
        raise Forbidden("without keys this service answers as localhost, 127.0.0.1 or [::1] only")
    key = connection.headers.get(HEADER)
    for_admins = scope is None or scope == "admin"
    session: Session | None = None
    if key is None and for_admins:
        session = await connection.app.state.api.sessions.recognise(connection.cookies.get(COOKIE))
    visitor = authenticator.named(session.name) if session is not None and session.signed_in else None
    if scope is not None:
        if visitor is not None and scope in visitor.scopes:
            connection.scope["user"] = visitor
        else:
            connection.scope["user"] = authenticator.require(key, scope)
    # A key in a header is proof enough: no other site can make a browser send it.
    if changes and key is None and for_admins and (visitor is not None or is_form(connection)):
        await _require_token(connection, session)


@lru_cache(maxsize=64)
def names_this_machine(host: str | None) -> bool:
    """Whether a `Host` is a name for this machine that nobody else can give it.

    Any site may let its own name lead to 127.0.0.1 once its page is loaded; to the browser that page is ours then, and
    reads what we answer. Where no key is asked for, the name is what gives it away. Browsers always send one.
    """
    try:
        return not host or is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _refuse_other_sites(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """Browsers say where a request comes from; other programs do not say.

    `Sec-Fetch-Site` is sent to trustworthy addresses only, `Origin` everywhere.
    """
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        origin = connection.headers.get("origin")
        # What stands behind `://` is what the same browser sends as Host; `null` has nothing there.
        foreign = origin is not None and origin.partition("://")[2] != (connection.headers.get("host") or None)
    if foreign:
        raise Forbidden("a page of another site sent this; nothing was done")


async def _require_token(connection: ASGIConnection[Any, Any, Any, Any], session: Session | None) -> None:
    sent = connection.headers.get(TOKEN_HEADER)
    if sent is None and is_form(connection):
        sent = (await read_form(connection)).get(TOKEN_FIELD)  # type: ignore[arg-type]  # a Request
    right = session is not None and hmac.compare_digest(
        (sent or "").encode(), (await connection.app.state.api.sessions.form_token(session)).encode()
    )
    if not right:
        raise Forbidden(
            "the form was not made for this session, or is out of date; load its page again and send it anew"
        )
