"""One address, two answers: a page for a browser, JSON for every other program.

`answer` gives the struct as JSON or renders a template with it; `page` is for what has no JSON (a form, a question);
`redirect` follows an action of a form. Invariant: every page carries a policy that lets the browser load nothing from
elsewhere and run no inline script, and is never kept in any cache.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from litestar import Response
from litestar.types import Scope

from app.api.auth.authentication import ANYONE, Caller
from app.api.auth.sessions import PATH
from app.api.dependencies import HttpRequest, authenticator_of, service_of
from app.api.pages.session_cookies import Visit, cookies_of, message_cookie, no_message, take_message, visit_of

T = TypeVar("T", bound=msgspec.Struct)
JSON, HTML = "application/json", "text/html"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    # Not `no-referrer`: a form's Origin would be `null` then, and could not be told from another site's.
    "Referrer-Policy": "same-origin",
    "Vary": "Accept, Cookie",
}


def under_admin(scope: Scope) -> bool:
    """Whether the path is one that has pages."""
    path = scope["path"]
    return path == PATH or path.startswith(PATH + "/")


def prefers_page(request: HttpRequest) -> bool:
    """Whether the answer should be a page: the caller prefers HTML to JSON, and the path has pages."""
    if not under_admin(request.scope):
        return False
    try:
        return request.accept.best_match([JSON, HTML]) == HTML
    except OverflowError:  # `q=inf`, which Litestar takes for a number
        return False


async def answer(
    request: HttpRequest, body: T, template: str, *, status_code: int = 200, **context: Any
) -> Response[T]:
    """`body` as JSON, or the page `template`, which sees `body` and `context`."""
    if prefers_page(request):
        return await page(request, template, status_code=status_code, body=body, **context)
    return Response(body, status_code=status_code, headers={"Vary": "Accept"})


async def page(request: HttpRequest, template: str, *, status_code: int = 200, **context: Any) -> Response[Any]:
    """A page. Templates see `visit`, `caller`, `keyless`, `root`, `path` and `now_ms` besides `context`."""
    service = service_of(request)
    visit = await visit_of(request)
    caller: Caller = request.scope.get("user") or ANYONE
    message = await take_message(request)
    html = await render(
        template,
        visit=visit,
        caller=caller,
        keyless=authenticator_of(request).keyless,
        root=service.settings.root_path,
        path=request.scope["path"],
        now_ms=service.clock.now_ms(),
        message=message,
        **context,
    )
    cookies = await cookies_of(request, visit)
    if message is not None:
        cookies.append(no_message(request))
    return Response(html, status_code=status_code, media_type=HTML, headers=PAGE_HEADERS, cookies=cookies)


async def redirect(request: HttpRequest, path: str, message: str = "", *, visit: Visit | None = None) -> Response[Any]:
    """Go on to another page (303), which shows `message` once. `path` is quoted already, and without the root path."""
    visit = visit or await visit_of(request)
    cookies = await cookies_of(request, visit)
    if message:
        cookies.append(await message_cookie(request, visit, message))
    location = service_of(request).settings.root_path + path
    return Response(None, status_code=303, headers={**PAGE_HEADERS, "Location": location}, cookies=cookies)


async def render(template: str, **context: Any) -> str:
    """A template as text; on a thread, because charts take some milliseconds each."""
    # The first page pays for importing what no other request needs.
    from app.api.pages.templating import environment  # noqa: PLC0415

    return await asyncio.to_thread(environment().get_template(template).render, context)


__all__ = ["answer", "page", "prefers_page", "redirect", "render", "under_admin"]
