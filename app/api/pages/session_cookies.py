"""The session of a browser on the admin pages, and its cookie.

The cookie also carries a message to the next page, which reports the result of a form. The message is signed with the
session, so no other site can forge one.
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


async def cookies_of(request: HttpRequest, visit: Visit, message: str) -> list[Cookie]:
    """The session cookie with a message for the next page, unless the browser has it already."""
    session = visit.session._replace(message=message[:MESSAGE_LENGTH])
    if session == visit.session and not visit.fresh:
        return []
    settings, lasts_ms = service_of(request).settings, session.expires_at_ms - service_of(request).clock.now_ms()
    return [
        Cookie(
            key=sessions_of(request).cookie_name,
            value=await sessions_of(request).cookie(session),
            path=settings.root_path + PATH,
            max_age=max(0, lasts_ms) // 1000,
            httponly=True,
            secure=request.scope["scheme"] == "https",
            samesite="lax",
        )
    ]
