"""HTML forms as they come in: `application/x-www-form-urlencoded`, in UTF-8.

`app.api.auth.authentication.guard` has checked, before a handler runs, that the form belongs to the caller's session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from litestar import Request
from litestar.connection import ASGIConnection

from app.errors import InvalidInput, Issue, TooLarge, Undecodable, UnsupportedMedia

MEDIA_TYPE = "application/x-www-form-urlencoded"
TOKEN_FIELD = "csrf_token"  # noqa: S105  # its name
MAX_FIELDS = 2_000
# A thousand of the longest ids fit.
MAX_BYTES = 2 * 1024 * 1024
MAX_BYTES_OF_ANYBODY = 16 * 1024


class Form:
    """The fields of a form. A field may come more than once (checkboxes)."""

    def __init__(self, fields: Mapping[str, list[str]]) -> None:
        self._fields = fields

    def get(self, name: str, default: str = "") -> str:
        """The first value of a field."""
        return self._fields.get(name, [default])[0]

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return self._fields.get(name, [])

    def require(self, name: str, what: str) -> str:
        """A value that is not blank; raises `InvalidInput` naming the field."""
        value = self.get(name).strip()
        if not value:
            raise InvalidInput(f"{what} is missing", [Issue(name, "must not be empty")])
        return value


def is_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    """Whether the body says that it is a form."""
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


async def read_form(request: Request[Any, Any, Any]) -> Form:
    """The form that a request brings; an empty one where the body is empty.

    Raises:
        UnsupportedMedia: no form.
        TooLarge: more than a route of this scope takes.
        Undecodable: not UTF-8, or far too many fields.
    """
    if not is_form(request):
        raise UnsupportedMedia(f"a form must come as {MEDIA_TYPE}")
    body = await request.body()
    most = MAX_BYTES if request.route_handler.opt.get("scope") else MAX_BYTES_OF_ANYBODY
    if len(body) > most:
        raise TooLarge(f"a form here has at most {most:,} bytes, this one has {len(body):,}")
    try:
        # Of an admin's large form undoing the escapes takes 0.1 s a megabyte: on a thread.
        pairs = _pairs(body) if len(body) <= MAX_BYTES_OF_ANYBODY else await asyncio.to_thread(_pairs, body)
    except ValueError as error:  # a UnicodeDecodeError is one
        raise Undecodable(f"the form is not decodable: {error}") from error
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return Form(fields)


def _pairs(body: bytes) -> list[tuple[str, str]]:
    return parse_qsl(
        body.decode(), keep_blank_values=True, encoding="utf-8", errors="strict", max_num_fields=MAX_FIELDS
    )
