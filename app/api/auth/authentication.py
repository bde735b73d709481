"""API keys and scopes, and who is let in.

A key is known only by its SHA-256. Every configured digest is compared, in constant time, so the time taken tells
nothing about which one was near. Without any key everyone may do everything; settings allow that on loopback only.
An admin's browser sends a session cookie instead of a key (`app.api.auth.sessions`).

Invariant: no request changes anything by a cookie alone, or because the browser runs on this machine. A form carries
the token of its session, any other request of a session carries it in a header, and cross-site requests are rejected. A
host name that resolves to this machine does not make a site trusted.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from app.api.auth.forms import TOKEN_FIELD, is_form, read_form
from app.api.auth.sessions import Session, Sessions
from app.errors import Forbidden, Unauthenticated
from app.settings import hash_key, is_loopback
from app.settings.parsers import ApiKey

HEADER = "x-api-key"
TOKEN_HEADER = "x-csrf-token"  # noqa: S105  # its name
MAX_KEY_LENGTH = 512
_PORT = re.compile(r":[0-9]+$")
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
            raise Forbidden(f"key {caller.name!r} lacks the scope {scope}")
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
    authenticator: Authenticator = connection.app.state.authenticator
    if changes:
        _refuse_other_sites(connection, any_port=not authenticator.keyless)
    if authenticator.keyless and not names_this_machine(connection.headers.get("host")):
        raise Forbidden(
            "without keys this service answers as localhost, 127.0.0.1 or [::1] only; for any other name, set "
            "PROFILES_API_KEYS (`profiles keys new` makes a key)"
        )
    key = connection.headers.get(HEADER)
    for_admins = scope is None or scope == "admin"
    session: Session | None = None
    if key is None and for_admins:
        sessions: Sessions = connection.app.state.sessions
        session = await sessions.recognise(connection.cookies.get(sessions.cookie_name))
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
    """Whether a `Host` is a name for this machine that no other party can give it.

    Any site may let its own name lead to 127.0.0.1 once its page is loaded; to the browser that page is ours then, and
    reads what we answer. Where no key is asked for, the name is what gives it away. Browsers always send one.
    """
    try:
        return not host or is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _refuse_other_sites(connection: ASGIConnection[Any, Any, Any, Any], *, any_port: bool) -> None:
    """Browsers say where a request comes from; other programs do not say.

    `Sec-Fetch-Site` is sent to trustworthy addresses only, `Origin` everywhere. Proxies often drop the port from `Host`
    (nginx's `$host`). With `any_port` the origin then needs no more than the same host name: without a key, a session's
    token is asked for besides, which a page on another port of this host does not know.
    """
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        if site not in ("same-origin", "none"):
            raise Forbidden("a page of another site sent this; nothing was done")
        return
    origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
    if origin is None:
        return
    # What stands behind `://` is what the same browser sends as Host; `null` has nothing there.
    own = origin.partition("://")[2]
    if not own or host not in (own, _PORT.sub("", own) if any_port else own):
        raise Forbidden(
            f"a page of another site sent this, or a proxy changed its Host; nothing was done. The page is of "
            f"{origin[:100]!r}, the request is for {host[:100]!r}. A proxy in front must pass the header Host on as it "
            f"came (nginx: proxy_set_header Host $http_host), or send it as X-Forwarded-Host and be named in "
            f"PROFILES_TRUSTED_PROXIES"
        )


async def _require_token(connection: ASGIConnection[Any, Any, Any, Any], session: Session | None) -> None:
    sent = connection.headers.get(TOKEN_HEADER)
    if sent is None and is_form(connection):
        sent = (await read_form(connection)).get(TOKEN_FIELD)  # type: ignore[arg-type]  # a Request
    right = session is not None and hmac.compare_digest(
        (sent or "").encode(), (await connection.app.state.sessions.form_token(session)).encode()
    )
    if not right:
        detail = "the form was not made for this session, or is out of date; load its page again and send it anew"
        if connection.app.state.sessions.cookie_name not in connection.cookies:
            detail += (
                ". The browser sent no session cookie: if that happens again, it blocks cookies, or PROFILES_ROOT_PATH "
                "is not the path under which it sees this service, or a proxy says https where it speaks http"
            )
        raise Forbidden(detail)
