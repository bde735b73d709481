"""Decodes requests strictly, with one exception: an integer may be written as a float.

JSON Schema's `integer` allows `7200.0` and `7.2e3`, and pandas writes a column of integers with nulls that way. msgspec
accepts them only in a mode that accepts `"7200"` as well.
"""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import Any, TypeVar

import msgspec

from app.errors import Issue

T = TypeVar("T")
# The second attempt decodes without a type, which may take twenty times the size of the body in memory. No valid body
# with an integer is longer than this.
_MOST_BYTES = 256 * 1024
_EXACT = 2.0**53  # a larger float may stand for several integers
_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_FIELD = re.compile(r"^Object (?P<fault>contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)
_SHOWN = 200
# The first bytes of other formats.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a ZIP file",
    b"PAR1": "Parquet",
    BOM_UTF16_LE: "text in UTF-16",
    BOM_UTF16_BE: "text in UTF-16",
}
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode(body: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode JSON as the type of `decoder`; a float such as `7200.0` is accepted as an integer. Raises
    `msgspec.ValidationError` if the body is JSON of another type, and one of `UNDECODABLE` if it is no JSON."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # The decoder stops at the first wrong type, so the rest may not be JSON, which is the error to report then.
        # `Raw` checks the syntax without building objects.
        msgspec.json.decode(body, type=msgspec.Raw)
        raw = bytes(body)
        raw.decode()
        if len(raw) > _MOST_BYTES or not _about_a_float(error):
            raise
        converted: T = convert(msgspec.json.decode(raw), decoder.type)
        return converted


def format_of(head: bytes) -> str | None:
    """The format of a file that begins with the bytes `head`, if it is not JSON and can be recognised."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def undecodable(error: Exception, body: bytes) -> str:
    """What is wrong with a body for which `decode` has raised one of `UNDECODABLE`."""
    name = "text with a byte order mark" if body.startswith(BOM_UTF8) else format_of(body)
    if name is not None:
        return f"not valid JSON: it is {name}; send JSON in UTF-8 without a byte order mark"
    if isinstance(error, UnicodeDecodeError):
        return "not valid UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not valid JSON: {str(error).removeprefix('JSON is malformed: ')}"


def issue_of(error: msgspec.ValidationError) -> Issue:
    message = str(error)
    found = _AT.search(message)
    path, detail = found["path"] if found else "", _AT.sub("", message)
    if (field := _FIELD.match(detail)) is not None:
        path = f"{path}.{field['name']}".removeprefix(".")
        detail = "unknown field" if field["fault"] == "contains unknown" else "missing"
    return Issue(path[:_SHOWN] or "$", detail if len(detail) <= _SHOWN else f"{detail[:_SHOWN]}…")


def convert(payload: object, kind: Any) -> Any:
    """Convert a decoded value to the type `kind`; a float such as 7200.0 is accepted as an integer. Raises
    `msgspec.ValidationError`, or `RecursionError` if the value is nested too deeply."""
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as error:
        if not _about_a_float(error):
            raise
        return msgspec.convert(_with_integers(payload), kind)


def _about_a_float(error: msgspec.ValidationError) -> bool:
    return "`int" in (message := str(error)) and "got `float`" in message


def _with_integers(value: object) -> object:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    return value
