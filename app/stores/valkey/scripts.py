"""Small Lua scripts, for atomic steps that no command offers. They are called by digest and loaded on demand."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

NO_SCRIPT = "NOSCRIPT"


class Script(NamedTuple):
    """A script and its SHA-1 digest."""

    text: bytes
    digest: str


def _script(text: bytes) -> Script:
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


SET_IF_EQUAL = _script(b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    return 1
end
return 0
""")
DELETE_IF_EQUAL = _script(b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
""")
