"""What the server does in one step, where no command of its own does: small Lua scripts.

Each is sent by its digest; a server that does not know it yet is told the text then.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

NO_SCRIPT = "NOSCRIPT"


class Script(NamedTuple):
    """A script, and what it is known by."""

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
