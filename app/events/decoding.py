"""Decoding what callers send, strictly but for one thing: a whole number may be written as a float.

JSON Schema's `integer` takes `7200.0` and `7.2e3`, and pandas writes a column of integers with nulls so. msgspec takes
them only where it would take `"7200"` as well.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
# A body is built a second time, untyped, which may take twenty times its size. No body longer than this can be right
# where an integer is expected.
_MOST_BYTES = 256 * 1024
_EXACT = 2.0**53  # beyond, floats skip integers


def decode(body: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T]) -> T:
    """JSON of the decoder's type.

    Raises:
        msgspec.ValidationError: it is JSON, and not of this type.
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # The decoder stops at the first thing wrong. What follows may not even be JSON, which is the greater fault. It
        # is looked through and not built: small lists take twenty times as much memory as their text.
        msgspec.json.decode(body, type=msgspec.Raw)
        raw = bytes(body)
        raw.decode()
        if len(raw) > _MOST_BYTES or not _about_a_float(error):
            raise
        converted: T = convert(msgspec.json.decode(raw), decoder.type)
        return converted


def convert(payload: object, kind: Any) -> Any:
    """What was decoded without a type, as this type.

    Raises:
        msgspec.ValidationError: it is not of this type.
        RecursionError: it is nested too deeply.
    """
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
