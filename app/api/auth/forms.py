"""HTML forms in UTF-8, URL-encoded. `authentication.guard` checks that a form belongs to the caller's session."""

import asyncio
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import MultiDict

from app.errors import TooLarge, Undecodable, UnsupportedMedia

MEDIA_TYPE = "application/x-www-form-urlencoded"
Form = MultiDict[str]  # a field may occur several times (checkboxes)
MAX_BYTES = 2 * 1024 * 1024  # room for 1,000 ids of the greatest length, percent-encoded
MAX_BYTES_WITHOUT_SCOPE = 16 * 1024


def is_form(connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
    return connection.headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE


async def read_form(request: Request[Any, Any, Any]) -> Form:
    """Read the form in the request's body. Raises `UnsupportedMedia` if the body is not a form, and `Undecodable` if it
    is not UTF-8 or has more than 2,000 fields. Raises `TooLarge` if it exceeds `MAX_BYTES` or, on a route that
    requires no scope, `MAX_BYTES_WITHOUT_SCOPE`."""
    if not is_form(request):
        raise UnsupportedMedia(f"Content-Type must be {MEDIA_TYPE}")
    body = await request.body()
    limit = MAX_BYTES if request.route_handler.opt.get("scope") else MAX_BYTES_WITHOUT_SCOPE
    if len(body) > limit:
        raise TooLarge(f"the form has {len(body):,} bytes; the limit is {limit:,} bytes")
    decode = partial(parse_qsl, keep_blank_values=True, errors="strict", max_num_fields=2_000)
    try:
        text = body.decode()
        if len(body) <= MAX_BYTES_WITHOUT_SCOPE:
            return Form(decode(text))
        return Form(await asyncio.to_thread(decode, text))  # 0.1 s per megabyte
    except ValueError as error:  # includes UnicodeDecodeError
        raise Undecodable(f"the form cannot be decoded: {error}") from error
