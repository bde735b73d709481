"""What a key holds: a value `V…` or a lease `L…`, as bytes.

    V<fingerprint>:<seq>:<computed_ms>:<expires_ms>:<JSON>      L<nonce>

The JSON comes last and verbatim, so that a hit is answered without decoding it. A held value serves as its own token:
two values with the same bytes were computed from the same knowledge, since the sequence number is part of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

VALUE = b"V"
LEASE = b"L"
_PARTS = 5


class Value(NamedTuple):
    """A cached value. `json` is the value as JSON text, `seq` the newest event its computation saw."""

    fingerprint: bytes
    seq: int
    computed_at_ms: int
    expires_at_ms: int
    json: bytes


def encode(value: Value) -> bytes:
    """The bytes that stand in the key."""
    return b"V%b:%d:%d:%d:%b" % value


def decode(held: bytes | None) -> Value | None:
    """The value a key holds; None for a lease, an empty key, or bytes this service did not write."""
    if held is None or held[:1] != VALUE:
        return None
    parts = held[1:].split(b":", _PARTS - 1)
    if len(parts) != _PARTS or not parts[4]:
        return None
    try:
        return Value(parts[0], int(parts[1]), int(parts[2]), int(parts[3]), parts[4])
    except ValueError:
        return None


def header(fingerprint: bytes) -> Callable[[bytes], re.Match[bytes] | None]:
    """Matches what comes before the JSON of a value under that fingerprint, and nothing else that a key may hold."""
    return re.compile(rb"V%b:\d{1,19}:\d{1,14}:\d{1,14}:(?=.)" % re.escape(fingerprint), re.DOTALL).match
