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
    if known is None:
        sessions = sessions_of(request)
        session = await sessions.recognise(request.cookies.get(sessions.cookie_name))
        fresh = session is None
        session = session or sessions.begin()
        known = request.state[_VISIT] = Visit(session, await sessions.form_token(session), fresh)
    return known


async def begin_visit(request: HttpRequest, name: str) -> Visit:
    """Begin a session with a new id, for the API key `name`; if `name` is empty, the session is anonymous."""
    sessions = sessions_of(request)
    session = sessions.begin(name)
    visit = request.state[_VISIT] = Visit(session, await sessions.form_token(session), fresh=True)
    return visit


async def cookies_of(request: HttpRequest, visit: Visit) -> list[Cookie]:
    """A list with the session cookie; empty if the browser has the cookie already."""
    if not visit.fresh:
        return []
    sessions = sessions_of(request)
    lasts_s = max(0, visit.session.expires_at_ms - service_of(request).clock.now_ms()) // 1000
    return [_cookie(request, sessions.cookie_name, await sessions.cookie(visit.session), lasts_s)]


async def message_cookie(request: HttpRequest, visit: Visit, text: str) -> Cookie:
    """A signed cookie with a message that the next page shows."""
    sessions = sessions_of(request)
    signed = await sessions.sign(visit.session, text[:MESSAGE_LENGTH])
    return _cookie(request, sessions.message_cookie_name, signed, 60)


def no_message(request: HttpRequest) -> Cookie:
    """A cookie that deletes the message, after a page has shown it."""
    return _cookie(request, sessions_of(request).message_cookie_name, "", 0)


async def take_message(request: HttpRequest) -> str | None:
    """The message that this page should show; None if there is none or its signature is wrong."""
    sessions = sessions_of(request)
    cookie = request.cookies.get(sessions.message_cookie_name)
    if cookie is None:
        return None
    return await sessions.unsign((await visit_of(request)).session, cookie)


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
