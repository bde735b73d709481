"""Parses requests: bodies into typed structs, times and ids. Every error names the place and the reason."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from msgspec import UNSET, UnsetType

from app.api.dependencies import HttpRequest
from app.api.schemas import Moment
from app.errors import InvalidInput, Issue, Undecodable, UnsupportedMedia
from app.events.strict_json import UNDECODABLE, decode, issue_of, undecodable
from app.features.clock import to_ms
from app.features.ids import all_allowed, id_problem

T = TypeVar("T", bound=msgspec.Struct)
JSON = "application/json"
NDJSON = "application/x-ndjson"
_directives = re.compile(r'(?:[^,"]|"[^"]*")+').findall
_MAX_DELTA_S = 2**31  # RFC 9111 takes a larger number of seconds for this one


def media_type(request: HttpRequest, allowed: Sequence[str]) -> str:
    """The media type of the body, in lower case; the first of `allowed` if the request names none. Raises
    `UnsupportedMedia` if the media type is not allowed, the charset is not UTF-8, or the body is compressed."""
    for name, supported in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        if (coding := request.headers.get(name, supported)).lower() != supported:
            raise UnsupportedMedia(f"{name} {coding[:40]!r} is not supported; send the body unencoded")
    header = request.headers.get("content-type")
    if header is None:
        return allowed[0]
    kind, _, parameters = header.partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters, re.IGNORECASE)
    if kind.strip().lower() not in allowed or (charset and charset[1].lower() not in ("utf-8", "utf8")):
        raise UnsupportedMedia(f"Content-Type must be {' or '.join(allowed)} in UTF-8, not {header[:80]!r}")
    return kind.strip().lower()


@lru_cache(maxsize=16)
def with_mirror(kind: type[T], mirror: type[msgspec.Struct]) -> type[T]:
    """A subclass of the request struct `kind` whose field `profile_features` has the type `mirror`, the Struct of the
    features that this service serves."""
    field = ("profile_features", mirror | UnsetType | None, UNSET)
    return cast(type[T], msgspec.defstruct(kind.__name__, [field], bases=(kind,), kw_only=True))


async def body_as(request: HttpRequest, kind: type[T]) -> T:
    """Decode the JSON body into a struct. Raises `UnsupportedMedia` if it is not JSON in UTF-8, `Undecodable` if it is
    not valid JSON, and `InvalidInput` if it does not match the struct; the issue names the field and what is allowed.
    """
    media_type(request, (JSON,))
    body = await request.body()
    if not body.strip():
        raise Undecodable("the body is empty; send a JSON object")
    try:
        return decode(body, msgspec.json.Decoder(kind))
    except msgspec.ValidationError as error:
        raise InvalidInput("the body is invalid", [issue_of(error)]) from error
    except UNDECODABLE as error:
        raise Undecodable(f"the body is {undecodable(error, body)}") from error


def check_ids(ids: Sequence[str], path: str) -> None:
    """Raise `InvalidInput` with an issue for each invalid id, at `path`, in which `{}` stands for the index."""
    if all_allowed(ids):
        return
    issues = [Issue(path.format(index), problem) for index, value in enumerate(ids) if (problem := id_problem(value))]
    raise InvalidInput("an id is invalid", issues)


def prefix_of(text: str) -> str:
    """Return `text`. Raises `Undecodable` (400) if no user id can begin with it."""
    # `.` and `..` are not ids, but `...` is.
    if text and text not in (".", "..") and (found := id_problem(text)) is not None:
        raise Undecodable("no id begins with this prefix", [Issue("prefix", found)])
    return text


def moment_ms(text: str, name: str) -> int:
    """The time of the query parameter `name`, in milliseconds since 1970. Raises `Undecodable` (400) if invalid."""
    # An unescaped + in a query arrives as a space.
    if (at_ms := _to_ms(text.replace(" ", "+"))) is None:
        reason = "must be RFC 3339 with a UTC offset, such as 2026-04-25T08:30:00+02:00 (encode + as %2B)"
        raise Undecodable(f"{name} {reason}", [Issue(name, reason)])
    return at_ms


def known_ms(text: str) -> int:
    """`known_at` of a training-set request in epoch ms. Raises `InvalidInput` (422) if it is invalid."""
    if (at_ms := _to_ms(text)) is None:
        reason = 'must be "as_of", or RFC 3339 with a UTC offset, such as 2026-04-25T08:30:00+02:00'
        raise InvalidInput("known_at is invalid", [Issue("known_at", reason)])
    return at_ms


def stale_if_error_s(request: HttpRequest) -> int | None:
    """The seconds of `Cache-Control: stale-if-error=N` (RFC 5861); None if the request has no such directive. If it has
    several, the first counts. An invalid number counts as no directive, because RFC 9111 has no error for it."""
    for directive in _directives(",".join(request.headers.getall("cache-control", []))):
        name, _, value = directive.partition("=")
        if name.strip().lower() == "stale-if-error":
            digits = value.strip().strip('"')
            return int(min(float(digits), _MAX_DELTA_S)) if digits.isascii() and digits.isdigit() else None
    return None


def _to_ms(text: str) -> int | None:
    try:
        return to_ms(msgspec.convert(text, Moment))
    except (msgspec.ValidationError, OverflowError):
        return None


async def check_parameters(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar guard: reject a query parameter that the route does not declare, or that is repeated (400), and an
    invalid id in the path (422). It is a coroutine function because Litestar runs synchronous guards in a thread."""
    if connection.scope["query_string"]:
        _check_query(connection, handler)
    for name in ("user_id", "decision_id"):
        if name in connection.path_params:
            check_ids([connection.path_params[name]], name)


def _check_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    parameters = handler.parsed_fn_signature.parameters
    declared = {
        getattr(field.kwarg_definition, "name", None) or name: field.is_optional
        and not field.has_inner_subclass_of(str)
        for name, field in parameters.items()
        if name not in connection.path_params and name != "request"
    }
    allowed = sorted(declared.keys() | set(handler.opt.get("query", ())))  # `query`: read by the handler itself
    seen: set[str] = set()
    issues: list[Issue] = []
    for name, value in connection.query_params.multi_items():
        if name not in allowed:
            known = f"this route has {', '.join(allowed)}" if allowed else "this route has none"
            issues.append(Issue(name, f"unknown query parameter; {known}"))
        elif name in seen:
            issues.append(Issue(name, "occurs more than once; send it once"))
        elif value.lower() == "null" and declared.get(name):
            # Litestar decodes the word `null` as None for an optional number.
            issues.append(Issue(name, "must be a number; omit the parameter instead of null"))
        seen.add(name)
    if issues:
        raise Undecodable("a query parameter is not allowed", issues)
