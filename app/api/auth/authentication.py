"""Authentication by API key or session cookie, authorization by scope, and protection against cross-site requests.

Invariant: neither a session cookie nor a loopback connection suffices for a change, because a page of another site can
make the browser send a request that has them. So cross-site requests are rejected, a form must carry the CSRF token of
its session, and any other request of a session must carry it in a header.
"""

import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from msgspec.structs import replace

from app.api.auth.forms import is_form, read_form
from app.api.auth.sessions import Session, Sessions
from app.errors import Forbidden, Unauthenticated
from app.settings import hash_key, is_loopback
from app.settings.parsers import SCOPES, ApiKey

MAX_KEY_LENGTH = 512
_PORT = re.compile(r":[0-9]+$")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
ALL_SCOPES = frozenset(SCOPES)
ANYONE = ApiKey("anyone", ALL_SCOPES, b"")


class Authenticator:
    """Finds the `ApiKey` of a caller: `ANYONE` if no keys are configured (`keyless`). The scope `admin` includes the
    others. `used` collects the names of the keys in use, until `app.asgi.note_key_uses` stores them."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keyless = not keys
        self.used: set[str] = set()
        self._keys = [replace(key, scopes=ALL_SCOPES) if "admin" in key.scopes else key for key in keys]
        # The valid keys seen so far, because hashing a key takes longer than the rest of a check. The time of a lookup
        # reveals no key: a `dict` compares texts only if their hashes, which have a secret seed, are equal.
        self._found: dict[str, ApiKey] = {}

    def require(self, key: str | None, scope: str) -> ApiKey:
        """The caller that a key belongs to. Raises `Unauthenticated`, or `Forbidden` if the key lacks the scope."""
        caller = self.find(key)
        if caller is None:
            problem = "no API key: send one" if key is None else "unknown API key"
            raise Unauthenticated(f"{problem} in the header X-API-Key")
        if scope not in caller.scopes:
            raise Forbidden(f"key {caller.name!r} lacks the scope {scope}")
        return caller

    def named(self, name: str) -> ApiKey | None:
        """The caller whose key has this name. Pass only the name in a valid session: no key is checked here."""
        found = next((known for known in self._keys if known.name == name), None)
        if found is not None:
            self.used.add(name)
        return found

    def find(self, key: str | None) -> ApiKey | None:
        """The caller that a key belongs to; None if there is no key or it is unknown."""
        if self.keyless:
            return ANYONE
        if key is None:
            return None
        key = key[:MAX_KEY_LENGTH]
        found = self._found.get(key)
        if found is None:
            digest = hash_key(key)
            for known in self._keys:
                if hmac.compare_digest(known.sha256, digest):
                    found = self._found[key] = known
            if found is None:
                return None
        self.used.add(found.name)
        return found


async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar guard: require the scope that a route names in `opt`, and reject cross-site changes. A route without
    a scope is open. If it has `opt["form"]`, as sign-in does, a form must carry the CSRF token of its session."""
    scope = handler.opt.get("scope")
    if scope is None and not handler.opt.get("form"):
        return
    changes = connection.scope["method"] not in _SAFE  # type: ignore[typeddict-item]  # every connection is HTTP here
    authenticator: Authenticator = connection.app.state.authenticator
    if changes:
        _reject_cross_site(connection, any_port=not authenticator.keyless)
    if authenticator.keyless and not names_this_machine(connection.headers.get("host")):
        raise Forbidden(
            "without API keys the service answers only at localhost, 127.0.0.1 or [::1]; to use another host name, set "
            "PROFILES_API_KEYS (`profiles keys new` makes a key)"
        )
    key = connection.headers.get("x-api-key")
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
    # A request with a key needs no token: another site cannot make a browser send that header.
    if changes and key is None and for_admins and (visitor is not None or is_form(connection)):
        await _require_token(connection, session)


@lru_cache(maxsize=64)
def names_this_machine(host: str | None) -> bool:
    """Whether a `Host` header is a loopback address or `localhost`. An absent header counts as loopback.

    This prevents DNS rebinding: (1) a browser loads a page from evil.example; (2) its owner points evil.example at
    127.0.0.1; (3) the page reads our answer to a request that the browser considers same-origin. Its `Host` is still
    evil.example, and browsers always send `Host`.
    """
    try:
        return not host or is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _reject_cross_site(connection: ASGIConnection[Any, Any, Any, Any], *, any_port: bool) -> None:
    """Raise `Forbidden` if headers that only browsers send show that a page of another site sent the request.

    Browsers send `Sec-Fetch-Site` only to HTTPS and loopback addresses, but `Origin` to every address. Proxies often
    drop the port from `Host` (nginx's `$host`). With `any_port`, a `Host` without a port matches any port in `Origin`.
    If keys are configured, this is safe: the guard requires a token that a page on another port cannot read.
    """
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        if site not in ("same-origin", "none"):
            raise Forbidden("the request was sent by a page of another site; nothing was done")
        return
    origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
    if origin is None:
        return
    # A browser sends the part after `://` as Host. The opaque origin `null` has no such part.
    own = origin.partition("://")[2]
    if not own or host not in (own, _PORT.sub("", own) if any_port else own):
        raise Forbidden(
            f"the request was sent by a page of another site, or a proxy changed its Host header; nothing was done. "
            f"Origin is {origin[:100]!r}, Host is {host[:100]!r}. A proxy must pass Host on unchanged (nginx: "
            f"proxy_set_header Host $http_host), or send it as X-Forwarded-Host and be listed in "
            f"PROFILES_TRUSTED_PROXIES"
        )


async def _require_token(connection: ASGIConnection[Any, Any, Any, Any], session: Session | None) -> None:
    sent = connection.headers.get("x-csrf-token")
    if sent is None and is_form(connection):
        sent = (await read_form(connection)).get("csrf_token")  # type: ignore[arg-type]  # a Request
    sessions: Sessions = connection.app.state.sessions
    token = (await sessions.form_token(session)).encode() if session is not None else None
    if token is None or not hmac.compare_digest((sent or "").encode(), token):
        detail = "the form belongs to another session or has expired; reload the page and send it again"
        if sessions.cookie_name not in connection.cookies:
            detail += (
                ". The browser sent no session cookie. If that happens again, the browser blocks cookies, or "
                "PROFILES_ROOT_PATH is not the path that the browser uses, or a proxy reports https for plain http"
            )
        raise Forbidden(detail)
