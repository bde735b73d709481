"""Maps errors to HTTP responses: RFC 9457 problem details, or a page for a browser."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import msgspec
from litestar import Response
from litestar.exceptions import HTTPException, NotFoundException, ValidationException
from litestar.params import KwargDefinition
from litestar.types import HTTPScope
from msgspec import UNSET, UnsetType

from app import errors
from app.api.dependencies import HttpRequest
from app.api.operations import allow_of
from app.api.pages.negotiation import ErrorPage, prefers_page, to_sign_in
from app.errors import Issue
from app.telemetry import logger

MEDIA_TYPE = "application/problem+json"
HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": 'ApiKey realm="profiles"'},
    408: {"Connection": "close"},
    503: {"Retry-After": "1"},
    507: {"Retry-After": "10"},  # an operator must free space on the disk
}
MAX_ISSUES = 100
_SHED = "overloaded"
DEFECT = "internal error: please report it with the X-Request-Id of this response"
log = logger("api")
# The names of RFC 9110. Those of `http.HTTPStatus` depend on the version of Python, and a problem's type must not.
PHRASES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}

# The first match counts, so subclasses stand before their base class.
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


class Problem(msgspec.Struct):
    """An error (RFC 9457). `errors` lists the faults of the request, if there are any."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[Issue] | UnsetType = UNSET


def problem(status: int, detail: str, issues: Sequence[Issue] = ()) -> Problem:
    """The problem body for an HTTP status. Its `type` is a URN of this service, one per status."""
    shown = list(issues[:MAX_ISSUES])
    if len(issues) > MAX_ISSUES:
        shown.append(Issue("…", f"and {len(issues) - MAX_ISSUES} more"))
    phrase = PHRASES.get(status) or HTTPStatus(status).phrase
    return Problem(f"urn:profiles:problem:{phrase.lower().replace(' ', '-')}", phrase, status, detail, shown or UNSET)


def encoded(status: int, detail: str, issues: Sequence[Issue] = ()) -> bytes:
    return msgspec.json.encode(problem(status, detail, issues))


def mark_shed(scope: HTTPScope, kind: str) -> None:
    """Mark a request as shed. `kind` is the kind of load, such as `events`."""
    cast(dict[str, Any], scope)[_SHED] = kind


def shed_kind(scope: HTTPScope) -> str | None:
    return cast(str | None, scope.get(_SHED))


def _respond(
    request: HttpRequest, status: int, detail: str, issues: Sequence[Issue] = (), **headers: str
) -> Response[Any]:
    headers = HEADERS.get(status, {}) | headers
    if prefers_page(request):
        if status == 401:
            return to_sign_in(request)
        title, said = problem(status, detail).title, detail[:1].upper() + detail[1:]
        variables = {"status": status, "title": title, "detail": said, "issues": issues[:MAX_ISSUES]}
        return ErrorPage(variables, status_code=status, headers=headers)
    return Response(encoded(status, detail, issues), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def on_error(request: HttpRequest, error: errors.ProfilesError) -> Response[Any]:
    for kind, status in STATUSES:
        if isinstance(error, kind):
            if isinstance(error, errors.Overloaded):
                mark_shed(request.scope, error.kind)
            elif status == 503:
                log.warning("unavailable", error=str(error))
            detail = str(error)
            if isinstance(error, errors.StoreUnavailable) and error.public_reason != errors.NO_ANSWER:
                detail = f"the database does not answer: {error.public_reason}"
            return _respond(request, status, detail, error.issues)
    log.error("unexpected_error", error=repr(error))
    return _respond(request, 500, DEFECT)


def on_http_exception(request: HttpRequest, error: HTTPException) -> Response[Any]:
    """Handle Litestar's errors: no route, wrong method, a query value of the wrong type, a body too large."""
    status = error.status_code
    if isinstance(error, ValidationException):
        extra: Any = error.extra if isinstance(error.extra, list) else []
        found = [(str(item.get("key", "query")), str(item["message"])) for item in extra]
        issues = [Issue(key, _allowed(request, key) or message) for key, message in found]
        return _respond(request, 400, "a parameter of the request is not allowed", issues)
    details = {
        404: f"no page or route has this path; see {request.service.settings.root_path}/schema",
        405: "this path does not support this method; the header Allow lists those that it supports",
        413: "the body is larger than 8 MB; send it in several requests",
    }
    headers: dict[str, str] = {}
    if error.headers and (allow := error.headers.get("allow")):
        find = request.app.asgi_router.handle_routing
        try:
            _, handler, *_, template = find(path=request.scope["path"], method="OPTIONS")
        except NotFoundException as no_route:  # Litestar checks the numbers in a path after the method
            return on_http_exception(request, no_route)
        headers["Allow"] = allow_of(handler, template, allow)
    return _respond(request, status, details.get(status, error.detail), (), **headers)


def _allowed(request: HttpRequest, key: str) -> str | None:
    """The message for an invalid parameter, such as `must be true or false`; None to use Litestar's message. Litestar's
    is less clear: it names the type of the value, which is always text, and only one of the two limits of a number."""
    parameter = request.route_handler.parsed_fn_signature.parameters.get(key)
    if parameter is None:
        return None
    if parameter.is_literal:
        return f"must be {', '.join(parameter.args[:-1])} or {parameter.args[-1]}"
    if parameter.annotation is bool:
        return "must be true or false"
    limits = parameter.kwarg_definition
    if not isinstance(limits, KwargDefinition) or limits.ge is None or limits.le is None:
        return None
    return f"must be a whole number from {limits.ge} to {limits.le}"


def on_exception(request: HttpRequest, error: Exception) -> Response[Any]:
    """Handle an unexpected exception: log it with its traceback, and answer 500 without any detail of it."""
    log.error("unexpected_error", route=request.scope.get("path_template"), exc_info=error)
    return _respond(request, 500, DEFECT)


# `Any`: Litestar's type knows no request class but its own.
EXCEPTION_HANDLERS: dict[int | type[Exception], Any] = {
    errors.ProfilesError: on_error,
    HTTPException: on_http_exception,
    Exception: on_exception,
}
