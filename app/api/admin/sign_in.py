"""Signing in and out, by exchanging an API key for a session, and the list of the keys."""

import re
from typing import Annotated, Any

import msgspec
from litestar import Response, get, post
from msgspec import Meta

from app.api.admin import admin_get, audited
from app.api.auth.forms import read_form
from app.api.dependencies import HttpRequest
from app.api.pages.negotiation import answer, page, redirect, visit_of
from app.features.clock import rfc3339
from app.telemetry import logger

log = logger("service.sign_in")
HOME = "/admin"
SIGN_IN = "/admin/sign-in"
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?:[/#]|$)", re.IGNORECASE)  # a browser removes these segments: `..` leaves /admin


class KeyView(msgspec.Struct):
    """An API key of `PROFILES_API_KEYS`."""

    name: str
    scopes: list[str]
    last_used: Annotated[str | None, Meta(description="Null: never. Other processes report after ten seconds.")]


class KeysView(msgspec.Struct):
    """The API keys that this process accepts, in the order of their names."""

    keys: list[KeyView]


def safe_next(path: str) -> str:
    """The path to redirect to after signing in: `path` if it is an admin page of this service, else the overview."""
    ours = path == HOME or path.startswith((f"{HOME}/", f"{HOME}?"))
    leaves = "\\" in path or _DOTS.search(path.partition("?")[0]) is not None
    return path if ours and path.isascii() and path.isprintable() and not leaves else HOME


async def _sign_in_page(request: HttpRequest, next_path: str, refusal: str = "", status: int = 200) -> Response[Any]:
    hours = request.service.settings.session_hours
    return await page(request, "sign_in.html", status_code=status, next=next_path, refusal=refusal, hours=hours)


@get(SIGN_IN, opt={"query": ["next"]}, include_in_schema=False)
async def get_sign_in(request: HttpRequest) -> Response[Any]:
    next_path = safe_next(request.query_params.get("next", HOME))
    if (await visit_of(request)).session.signed_in:
        return await redirect(request, next_path)
    return await _sign_in_page(request, next_path)


@post(SIGN_IN, status_code=200, opt={"form": True}, include_in_schema=False)
async def post_sign_in(request: HttpRequest) -> Response[Any]:
    service, authenticator = request.service, request.parts.authenticator
    form = await read_form(request)
    next_path = safe_next(form.get("next", HOME))
    if authenticator.keyless:
        return await redirect(request, next_path, "Signing in is not needed: no API keys are configured.")
    key = form.get("key", "").strip() or None
    caller = authenticator.find(key)
    if caller is None:
        # Not audited: any client that reaches this page could fill the disk with attempts.
        log.warning("sign_in_refused", reason="unknown key")
        return await _sign_in_page(request, next_path, "This key is not known.", status=401)
    outcome = "done" if "admin" in caller.scopes else f"refused: key {caller.name!r} lacks the scope admin"
    # Before the session begins: if the audit fails, the error page must not set the session cookie.
    await service.audit_trail.begin(service.clock.now_ms(), caller.name, "sign in", "session", outcome)
    if "admin" not in caller.scopes:
        return await _sign_in_page(request, next_path, "This key lacks the scope admin.", status=403)
    if request.headers.get("x-forwarded-proto") == "https" and request.scope["scheme"] != "https":
        log.warning("proxy_not_trusted", effect="the session cookie lacks Secure", setting="PROFILES_TRUSTED_PROXIES")
    await visit_of(request, begin=caller.name)
    return await redirect(request, next_path)


@post("/admin/sign-out", status_code=200, opt={"scope": "admin", "form": True}, include_in_schema=False)
async def post_sign_out(request: HttpRequest) -> Response[Any]:
    """End the session on the server, so that no copy of the session cookie is accepted any more."""
    visit = await visit_of(request)
    if not visit.session.signed_in:
        return await redirect(request, HOME)
    async with audited(request, "sign out", "session"):
        await request.parts.sessions.end(visit.session)
    await visit_of(request, begin="")
    return await redirect(request, SIGN_IN, "You have signed out.")


@admin_get(
    "/admin/keys",
    summary="List the API keys",
    description="Name, scopes and last use of every configured key. The keys themselves are not known to the service. "
    "A page for a browser.",
)
async def get_keys(request: HttpRequest) -> Response[KeysView]:
    used_ms = dict(await request.app.state.key_uses.newest_ms())
    # Uses that this process has not stored yet happened within the last seconds.
    used_ms |= dict.fromkeys(request.parts.authenticator.used, request.service.clock.now_ms())
    found = [
        KeyView(key.name, sorted(key.scopes), rfc3339(used_ms[key.name]) if key.name in used_ms else None)
        for key in sorted(request.service.settings.api_keys, key=lambda key: key.name)
    ]
    return await answer(request, KeysView(found), "keys.html")
