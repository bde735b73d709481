"""What a key holds: a value `V…` or a lease `L…`, as bytes.

    V<fingerprint>:<seq>:<computed_ms>:<expires_ms>:<JSON>      L<nonce>

The JSON comes last and verbatim, so that a hit is answered without decoding it. A held value serves as its own token:
two values with the same bytes were computed from the same knowledge, since the sequence number is part of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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

    def is_stale(self, newest_event: int) -> bool:
        """Whether the computation missed `newest_event`, the user's newest that invalidates the feature."""
        return self.seq < newest_event


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


def hits(fingerprints: Sequence[bytes]) -> Callable[[Sequence[bytes]], Sequence[bytes] | None]:
    """Makes a function from what keys hold to the JSON in them, where each holds a value under its fingerprint.

    It gives None where one does not. One match for all is twice as fast as one for each; NUL parts them, which JSON
    text cannot contain.
    """
    one = rb"V%b:\d{1,19}:\d{1,14}:\d{1,14}:([^\0]+)"
    match = re.compile(b"\0".join([one % re.escape(fingerprint) for fingerprint in fingerprints])).fullmatch

    def values(held: Sequence[bytes]) -> Sequence[bytes] | None:
        found = match(b"\0".join(held))
        return found.groups() if found is not None else None

    return values
