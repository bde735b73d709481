"""Content negotiation: the admins' routes answer with a page to a browser, with JSON to any other client.

The answer to a form is a redirection. The next page shows the result, which the session cookie carries, signed, so that
no other site can forge it. Invariant: every page carries a content security policy that forbids inline scripts and
requests to other sites, and no cache stores it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec
from litestar import Litestar, Response
from litestar.datastructures import Cookie
from litestar.types import ASGIApp, Receive, Scope, Send

from app.api.auth.sessions import NOT_SIGNED_IN, PATH, Session
from app.api.dependencies import HttpRequest
from app.errors import StoreUnavailable

T = TypeVar("T", bound=msgspec.Struct)
JSON, HTML = "application/json", "text/html"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
MESSAGE_LENGTH = 600
_VISIT = "visit"
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    # Not `no-referrer`: the Origin of a form would be `null`, as that of a sandboxed page of another site is.
    "Referrer-Policy": "same-origin",
    "Vary": "Accept, Cookie",
}


class Visit(NamedTuple):
    """A browser's session and the CSRF token of its forms. `fresh`: the browser does not have the cookie yet."""

    session: Session
    form_token: str
    fresh: bool


async def visit_of(request: HttpRequest, *, begin: str | None = None) -> Visit:
    """The session of the request's cookie, or a new anonymous one; later calls for the request return the same. If
    `begin` is given, the cookie is ignored and a new session begins. It is signed in with the API key that has the name
    `begin`; if `begin` is empty, it is anonymous."""
    if begin is not None or _VISIT not in request.state:
        sessions = request.parts.sessions
        known = await sessions.recognise(request.cookies.get(sessions.cookie_name)) if begin is None else None
        session = known or sessions.begin(begin or NOT_SIGNED_IN)
        request.state[_VISIT] = Visit(session, await sessions.form_token(session), fresh=known is None)
    visit: Visit = request.state[_VISIT]
    return visit


async def _cookies(request: HttpRequest, message: str) -> list[Cookie]:
    """The session cookie with a message for the next page; an empty list if the browser already has this cookie."""
    visit, service, sessions = await visit_of(request), request.service, request.parts.sessions
    session = visit.session._replace(message=message[:MESSAGE_LENGTH])
    if session == visit.session and not visit.fresh:
        return []
    return [
        Cookie(
            key=sessions.cookie_name,
            value=await sessions.cookie(session),
            path=service.settings.root_path + PATH,
            max_age=max(0, session.expires_at_ms - service.clock.now_ms()) // 1000,
            httponly=True,
            secure=request.scope["scheme"] == "https",
            samesite="lax",
        )
    ]


def prefers_page(request: HttpRequest) -> bool:
    """Whether the client prefers HTML to JSON and the path is one of the admins' routes."""
    return f"{request.scope['path']}/".startswith(f"{PATH}/") and prefers(request, HTML)


def prefers(request: HttpRequest, media_type: str) -> bool:
    """Whether the client prefers `media_type` to JSON."""
    try:
        return request.accept.best_match([JSON, media_type]) == media_type
    except OverflowError:  # Litestar parses `q=inf` as a number
        return False


async def answer(
    request: HttpRequest, body: T, template: str, *, status_code: int = 200, **context: Any
) -> Response[T]:
    """`body` as JSON or, for a browser, the page `template` with the variables `body` and `context`."""
    if prefers_page(request):
        return await page(request, template, status_code=status_code, body=body, **context)
    return Response(body, status_code=status_code, headers={"Vary": "Accept"})


async def page(request: HttpRequest, template: str, *, status_code: int = 200, **context: Any) -> Response[Any]:
    """Render a page with the variables `context`. It shows the message that a redirect left in the cookie, once."""
    visit = await visit_of(request)
    html = await _render(request, template, visit=visit, message=visit.session.message, **context)
    cookies = await _cookies(request, "")
    return Response(html, status_code=status_code, media_type=HTML, headers=PAGE_HEADERS, cookies=cookies)


async def redirect(request: HttpRequest, path: str, message: str = "") -> Response[Any]:
    """Redirect (303) to a page that shows `message` once. `path` is percent-encoded, without the root path."""
    cookies = await _cookies(request, message or (await visit_of(request)).session.message)
    return _see_other(request, path, cookies)


def to_sign_in(request: HttpRequest) -> Response[Any]:
    """Redirect to sign-in. It leads to the requested page if the request is a GET, otherwise to the overview."""
    here = request.scope["path"] if request.method == "GET" else "/admin"
    query = request.scope["query_string"].decode("latin-1")
    target = quote(here, safe="/") + (f"?{query}" if query and request.method == "GET" else "")
    return _see_other(request, f"/admin/sign-in?next={quote(target, safe='')}")


def _see_other(request: HttpRequest, path: str, cookies: Sequence[Cookie] = ()) -> Response[Any]:
    location = request.service.settings.root_path + path
    return Response(None, status_code=303, headers={**PAGE_HEADERS, "Location": location}, cookies=cookies)


async def _render(request: HttpRequest, template: str, **context: Any) -> str:
    """Render a template. It sees `keyless`, `root`, `path`, `navigation` and `now_ms` besides `context`."""
    # Imported here because only a page pays for the templates.
    from app.api.pages.templating import NAVIGATION, OF_SCORING, environment  # noqa: PLC0415

    service = request.service
    context |= {
        "keyless": request.parts.authenticator.keyless,
        "root": service.settings.root_path,
        "path": request.scope["path"],
        "navigation": [item for item in NAVIGATION if service.scoring is not None or item[0] not in OF_SCORING],
        "now_ms": service.clock.now_ms(),
    }
    # On a thread, because charts take some milliseconds each.
    return await asyncio.to_thread(environment().get_template(template).render, context)


class ErrorPage(Response[Any]):
    """An error as a page. `content` has the variables of the template. The page needs neither the cache nor the
    database. It is rendered when it is sent, because Litestar's exception handlers are not coroutines.

    It sets no session cookie. The request may be a form of another site, with which a browser does not send the admin's
    cookie. A new cookie in the response would replace the admin's cookie, and so sign the admin out.
    """

    def to_asgi_response(self, app: Litestar | None, request: HttpRequest, **_: Any) -> ASGIApp:  # type: ignore[override]
        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                visit = await visit_of(request)
            except StoreUnavailable:
                visit = Visit(Session("", "", 0), "", fresh=False)
            html = await _render(request, "error.html", visit=visit, message=None, **self.content)
            headers = {**self.headers, **PAGE_HEADERS}
            response = Response(html, status_code=self.status_code, media_type=HTML, headers=headers)
            await response.to_asgi_response(None, request)(scope, receive, send)

        return respond
