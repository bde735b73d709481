"""The cookies of the admin pages: one for the browser's session, one with a message for the next page.

A message reports the result of a form on the page that follows. It travels in a cookie that lives for one minute and is
signed like the session, so that no other site can forge a message.
"""

from __future__ import annotations

import msgspec
from litestar.datastructures import Cookie

from app.api.auth.sessions import PATH, Session
from app.api.dependencies import HttpRequest, service_of, sessions_of

MESSAGE_LENGTH = 600
_VISIT = "visit"


class Visit(msgspec.Struct, frozen=True):
    """A browser's session and the CSRF token of its forms. `fresh`: the browser does not have the cookie yet."""

    session: Session
    form_token: str
    fresh: bool


async def visit_of(request: HttpRequest) -> Visit:
    """The session of a request; a new anonymous one if the request has no valid session cookie."""
    known: Visit | None = request.state.get(_VISIT)
    if known is not None:
        return known
    sessions = sessions_of(request)
    session = await sessions.recognise(request.cookies.get(sessions.cookie_name))
    return await _enter(request, session or sessions.begin(), fresh=session is None)


async def begin_visit(request: HttpRequest, name: str) -> Visit:
    """Begin a session with a new id, for the API key `name`; if `name` is empty, the session is anonymous."""
    return await _enter(request, sessions_of(request).begin(name), fresh=True)


async def _enter(request: HttpRequest, session: Session, *, fresh: bool) -> Visit:
    visit = request.state[_VISIT] = Visit(session, await sessions_of(request).form_token(session), fresh)
    return visit


async def cookies_of(request: HttpRequest, visit: Visit, message: str | None) -> list[Cookie]:
    """The session cookie, unless the browser has it already, and a signed cookie with a message that the next page
    shows. An empty `message` deletes that cookie, None leaves it."""
    sessions = sessions_of(request)
    cookies = []
    if visit.fresh:
        lasts_s = max(0, visit.session.expires_at_ms - service_of(request).clock.now_ms()) // 1000
        cookies.append(_cookie(request, sessions.cookie_name, await sessions.cookie(visit.session), lasts_s))
    if message is not None:
        signed = await sessions.sign(visit.session, message[:MESSAGE_LENGTH]) if message else ""
        cookies.append(_cookie(request, sessions.message_cookie_name, signed, 60 if message else 0))
    return cookies


async def message_of(request: HttpRequest) -> str | None:
    """The message that the requested page should show, from a signed cookie; None without a cookie or if its signature
    is wrong."""
    sessions = sessions_of(request)
    cookie = request.cookies.get(sessions.message_cookie_name)
    return await sessions.unsign((await visit_of(request)).session, cookie) if cookie is not None else None


def _cookie(request: HttpRequest, name: str, value: str, max_age_s: int) -> Cookie:
    return Cookie(
        key=name,
        value=value,
        path=service_of(request).settings.root_path + PATH,
        max_age=max_age_s,
        httponly=True,
        secure=request.scope["scheme"] == "https",
        samesite="lax",
    )
