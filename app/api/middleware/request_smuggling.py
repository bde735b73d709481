"""Requests that two programs on the way may understand differently.

granian refuses most of them (two lengths, broken chunks, spaces before a colon); this is what it lets through. Whoever
stands in front may have looked at another `Host`, key or type than the one we would take, so there must not be two.
"""

from __future__ import annotations

from litestar.types import HTTPScope

_ONCE = frozenset({b"host", b"x-api-key", b"content-type", b"content-encoding"})


def framing_problem(scope: HTTPScope) -> str | None:
    """Why a request is not to be understood, or None where it is."""
    seen: set[bytes] = set()
    for name, _ in scope["headers"]:
        if name in _ONCE:
            if name in seen:
                return f"the header {name.decode()} is given more than once"
            seen.add(name)
    return None
