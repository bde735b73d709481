"""Errors as pages, where a browser asked for one. Who has not signed in is sent to do so, and comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from litestar import Litestar, Response
from litestar.types import ASGIApp, Receive, Scope, Send

from app.api.auth.authentication import ANYONE
from app.api.auth.sessions import Session
from app.api.dependencies import HttpRequest, authenticator_of, service_of
from app.api.pages.negotiation import HTML, PAGE_HEADERS, render
from app.api.pages.session_cookies import Visit, visit_of
from app.errors import Issue, StoreUnavailable

_NOBODY = Visit(Session("", "", 0), "", fresh=False)


class ErrorPage(Response[Any]):
    """An error as a page; needs neither cache nor database.

    It begins no session. A form that another site sends comes without the cookie that a browser holds for us: a new one
    in the refusal would sign its visitor out.
    Litestar's handlers of errors may not wait, but rendering must: it is done when the answer is sent.
    """

    def __init__(
        self, status: int, title: str, detail: str, issues: Sequence[Issue], headers: Mapping[str, str]
    ) -> None:
        super().__init__(None, status_code=status)
        self._error: dict[str, Any] = {
            "status": status,
            "title": title,
            "detail": detail[:1].upper() + detail[1:],
            "issues": issues,
        }
        self._more_headers = headers

    def to_asgi_response(self, app: Litestar | None, request: HttpRequest, **_: Any) -> ASGIApp:  # type: ignore[override]
        """The application that answers."""

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            response = await self._rendered(request)
            await response.to_asgi_response(None, request)(scope, receive, send)

        return respond

    async def _rendered(self, request: HttpRequest) -> Response[Any]:
        if self.status_code == 401:
            return _to_sign_in(request)
        service = service_of(request)
        try:
            visit = await visit_of(request)
        except StoreUnavailable:
            visit = _NOBODY
        html = await render(
            "error.html",
            visit=visit,
            caller=request.scope.get("user") or ANYONE,
            keyless=authenticator_of(request).keyless,
            root=service.settings.root_path,
            path=request.scope["path"],
            now_ms=service.clock.now_ms(),
            message=None,
            **self._error,
        )
        headers = {**self._more_headers, **PAGE_HEADERS}
        return Response(html, status_code=self.status_code, media_type=HTML, headers=headers)


def _to_sign_in(request: HttpRequest) -> Response[Any]:
    """Back to where one wanted to go, afterwards; but what a form wanted done is not done by coming back."""
    here = request.scope["path"] if request.method == "GET" else "/admin"
    query = request.scope["query_string"].decode("latin-1")
    target = quote(here, safe="/") + (f"?{query}" if query and request.method == "GET" else "")
    location = f"{service_of(request).settings.root_path}/admin/sign-in?next={quote(target, safe='')}"
    return Response(None, status_code=303, headers={**PAGE_HEADERS, "Location": location})
