"""Errors as RFC 9457 problem details, or as a page: the one place where the tree of errors meets HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Response
from litestar.exceptions import HTTPException, ValidationException

from app import errors
from app.api.dependencies import HttpRequest, service_of
from app.api.middleware.load_shedding import mark
from app.api.openapi.allowed_methods import allow_of
from app.api.pages.negotiation import ErrorPage, prefers_page
from app.errors import Issue
from app.telemetry import logger

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
RETRY_AFTER_FULL_S = 10  # an operator has to make room
MAX_ISSUES = 100
log = logger("api")
# The names of RFC 9110: those of `http` differ between versions of Python, and a problem's type must not.
PHRASES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}

# The first class that matches, so a branch stands after its leaves.
STATUSES: tuple[tuple[type[errors.ProfilesError], int], ...] = (
    (errors.Undecodable, 400),
    (errors.InvalidInput, 422),
    (errors.Unauthenticated, 401),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.TooSlow, 408),
    (errors.TooLarge, 413),
    (errors.UnsupportedMedia, 415),
    (errors.StoreFull, 507),
    (errors.Unavailable, 503),
)


class ProblemIssue(msgspec.Struct):
    """One thing wrong with a request."""

    path: str
    detail: str


class Problem(msgspec.Struct, omit_defaults=True):
    """An error, after RFC 9457. `errors` says where a request is at fault."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[ProblemIssue] | None = None


def problem(status: int, detail: str, issues: Sequence[Issue] = ()) -> Problem:
    """A problem; its type is a name in this service's own space, one a status."""
    shown = [ProblemIssue(issue.path, issue.detail) for issue in issues[:MAX_ISSUES]]
    if len(issues) > MAX_ISSUES:
        shown.append(ProblemIssue("…", f"and {len(issues) - MAX_ISSUES} more"))
    phrase = PHRASES.get(status) or HTTPStatus(status).phrase
    return Problem(f"urn:profiles:problem:{phrase.lower().replace(' ', '-')}", phrase, status, detail, shown or None)


def headers_of(status: int) -> dict[str, str]:
    """What a status wants in its headers."""
    if status == 401:
        return {"WWW-Authenticate": 'ApiKey realm="profiles"'}
    if status == 507:
        return {"Retry-After": str(RETRY_AFTER_FULL_S)}
    if status == 408:
        return {"Connection": "close"}
    return {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}


def encoded(status: int, detail: str, issues: Sequence[Issue] = ()) -> bytes:
    """A problem as JSON."""
    return msgspec.json.encode(problem(status, detail, issues))


def _respond(
    request: HttpRequest,
    status: int,
    detail: str,
    issues: Sequence[Issue] = (),
    headers: Mapping[str, str] | None = None,
) -> Response[Any]:
    headers = {**headers_of(status), **(headers or {})}
    if prefers_page(request):
        return ErrorPage(status, problem(status, detail).title, detail, issues[:MAX_ISSUES], headers)
    return Response(encoded(status, detail, issues), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def on_error(request: HttpRequest, error: errors.ProfilesError) -> Response[Any]:
    """An error of the tree."""
    for kind, status in STATUSES:
        if isinstance(error, kind):
            if isinstance(error, errors.Overloaded):
                mark(request.scope, error.kind)
            elif status == 503:
                log.warning("unavailable", error=str(error))
            return _respond(request, status, str(error), getattr(error, "issues", ()))
    log.error("unexpected_error", error=repr(error))
    return _respond(request, 500, "the service failed in a way it should not")


def on_http_exception(request: HttpRequest, error: HTTPException) -> Response[Any]:
    """An error of the framework: no route, wrong method, a query value of the wrong type, a body too large."""
    status = error.status_code
    if isinstance(error, ValidationException):
        extra: Any = error.extra if isinstance(error.extra, list) else []
        issues = [Issue(str(item.get("key", "query")), str(item.get("message", ""))) for item in extra]
        return _respond(request, 400, "the request has a parameter that is not allowed", issues)
    details = {
        404: f"there is nothing at this path; see {service_of(request).settings.root_path}/schema",
        405: "this path does not answer to this method",
        413: "the body is over 8 MB",
    }
    headers: dict[str, str] = {}
    if error.headers and (allow := error.headers.get("allow")):
        _, handler, *_ = request.app.asgi_router.handle_routing(path=request.scope["path"], method="OPTIONS")
        headers["Allow"] = allow_of(handler, allow)
    return _respond(request, status, details.get(status, error.detail), headers=headers)


def on_exception(request: HttpRequest, error: Exception) -> Response[Any]:
    """A defect: logged with its traceback, but not disclosed."""
    log.error("unexpected_error", route=request.scope.get("path_template"), exc_info=error)
    return _respond(request, 500, "the service failed in a way it should not")
