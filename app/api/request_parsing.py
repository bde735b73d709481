"""Reading what a request brings: bodies into typed structs, times, ids; every refusal with its place and reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import msgspec
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from msgspec import UNSET, Meta, UnsetType

from app.api.dependencies import HttpRequest
from app.errors import InvalidInput, Issue, Undecodable, UnsupportedMedia
from app.events.decoding import decode
from app.features.clock import to_ms
from app.features.ids import id_problem

T = TypeVar("T", bound=msgspec.Struct)
PROFILE_FEATURES = "profile_features"
JSON = "application/json"
NDJSON = "application/x-ndjson"
_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_FIELD = re.compile(r"^Object (?P<fault>contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)
_SHOWN = 200
_Moment = Annotated[datetime, Meta(tz=True)]


def media_type(request: HttpRequest, allowed: Sequence[str]) -> str:
    """The body's media type, one of `allowed`; the first where none is named.

    Raises:
        UnsupportedMedia: another one, another charset than UTF-8, or a compressed body.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(f"send the body as it is, without Content-Encoding {encoding[:40]!r}")
    coding = request.headers.get("transfer-encoding", "chunked")
    if coding.lower() != "chunked":
        raise UnsupportedMedia(f"send the body as it is, without Transfer-Encoding {coding[:40]!r}")
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
    """A kind of request whose `profile_features`, if it has any, are those of this mirror; others are not read."""
    declared = {item.name: item.type for item in msgspec.structs.fields(kind)}.get(PROFILE_FEATURES)
    if declared is None:
        return kind
    _, *meta = get_args(get_type_hints(kind, include_extras=True)[PROFILE_FEATURES])
    annotated: Any = Annotated[(mirror | UnsetType | None, *meta)]
    made = msgspec.defstruct(
        kind.__name__,
        [(PROFILE_FEATURES, annotated, UNSET)],
        bases=(kind,),
        namespace={"__doc__": kind.__doc__},
        kw_only=True,
        forbid_unknown_fields=True,
    )
    return cast(type[T], made)


async def body_as(request: HttpRequest, kind: type[T]) -> T:
    """The JSON body as a struct.

    Raises:
        UnsupportedMedia, Undecodable, InvalidInput: naming the field, the reason and what is allowed.
    """
    media_type(request, (JSON,))
    body = await request.body()
    if not body.strip():
        raise Undecodable("the body is empty; a JSON object is expected")
    try:
        return decode(body, msgspec.json.Decoder(kind))
    except msgspec.ValidationError as error:
        raise InvalidInput("the body is invalid", [issue_of(str(error))]) from error
    except UnicodeDecodeError as error:
        raise Undecodable("the body is not valid UTF-8") from error
    except RecursionError as error:
        raise Undecodable("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise Undecodable(f"the body is not valid JSON: {str(error).removeprefix('JSON is malformed: ')}") from error


def issue_of(message: str) -> Issue:
    """What msgspec found, at the field that it is about."""
    found = _AT.search(message)
    path, detail = found["path"] if found else "", _AT.sub("", message)
    if (field := _FIELD.match(detail)) is not None:
        path = f"{path}.{field['name']}".removeprefix(".")
        detail = "unknown field" if field["fault"] == "contains unknown" else "missing"
    return Issue(path[:_SHOWN] or "$", detail[:_SHOWN])


def check_ids(ids: Sequence[str], path: str) -> None:
    """Raise `InvalidInput` naming every id that is not allowed; `path` holds `{}` for the index."""
    issues = [Issue(path.format(index), problem) for index, value in enumerate(ids) if (problem := id_problem(value))]
    if issues:
        raise InvalidInput("an id is not allowed", issues)


def prefix_of(text: str) -> str:
    """The beginning of an id, from a query; raises `Undecodable` (400) where no id can begin so."""
    # `.` and `..` are no ids, and the beginnings of some.
    if text and text not in (".", "..") and (found := id_problem(text)) is not None:
        raise Undecodable("no id begins so", [Issue("prefix", found)])
    return text


def moment_ms(text: str, name: str) -> int:
    """A time of the query in milliseconds; raises `Undecodable` (400)."""
    # In a query an unescaped + arrives as a space; a time has no other use for one there.
    try:
        return to_ms(msgspec.convert(text.replace(" ", "+"), _Moment))
    except (msgspec.ValidationError, OverflowError) as error:
        reason = "must be RFC 3339 with a UTC offset, as 2026-04-25T08:30:00+02:00 (write + as %2B)"
        raise Undecodable(f"{name} {reason}", [Issue(name, reason)]) from error


def known_ms(text: str | None) -> int | None:
    """`known_at` of a body in milliseconds; None where it is absent or `as_of`; raises `InvalidInput` (422)."""
    if text is None or text == "as_of":
        return None
    try:
        return to_ms(msgspec.convert(text, _Moment))
    except (msgspec.ValidationError, OverflowError) as error:
        reason = 'must be "as_of", or RFC 3339 with a UTC offset, as 2026-04-25T08:30:00+02:00'
        raise InvalidInput("known_at is not allowed", [Issue("known_at", reason)]) from error


def feature_names(text: str | None) -> list[str] | None:
    """`features=a,b` as names; None where it is not given."""
    return None if text is None else text.split(",")


async def check_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar's guard: a query parameter that the route does not declare, or that comes twice, is refused (400).

    It waits for nothing; a guard that is no coroutine would be run in a thread, for each request.
    """
    if not connection.scope["query_string"]:
        return
    parameters = handler.parsed_fn_signature.parameters
    declared = {
        getattr(field.kwarg_definition, "name", None) or name: field.is_optional
        and not field.has_inner_subclass_of(str)
        for name, field in parameters.items()
        if name not in connection.path_params and name != "request"
    }
    allowed = sorted(declared.keys() | set(handler.opt.get("query", ())))  # `query`: what it reads by itself
    seen: set[str] = set()
    issues: list[Issue] = []
    for name, value in connection.query_params.multi_items():
        if name not in allowed:
            known = f"known are {', '.join(allowed)}" if allowed else "this route has none"
            issues.append(Issue(name, f"unknown query parameter; {known}"))
        elif name in seen:
            issues.append(Issue(name, "given more than once"))
        elif value.lower() == "null" and declared.get(name):
            # Where a number may be missing, the decoder takes the word for none.
            issues.append(Issue(name, "must be a number; leave it out for none"))
        seen.add(name)
    if issues:
        raise Undecodable("the query is not allowed", issues)
