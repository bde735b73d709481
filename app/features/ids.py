"""Which identifiers are allowed: for users, tips, events and decisions alike.

1 to 128 characters of Unicode, without control characters, surrogates or `/`, and not `.` or `..`, so that every id
can stand in a URL path and in a log line.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

MAX_ID_LENGTH = 128
ID_PATTERN = r"^(?!\.{1,2}$)[^/\x00-\x1f\x7f-\x9f]+$"  # as JSON Schema writes it; `id_problem` decides
_FORBIDDEN = re.compile("[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Id = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_ID_LENGTH,
        description="1 to 128 characters without control characters or `/`, and not `.` or `..`.",
        extra_json_schema={"pattern": ID_PATTERN},
    ),
]


def id_problem(value: str) -> str | None:
    """Why `value` is not allowed as an id, or None where it is."""
    if not value:
        return "must not be empty"
    if len(value) > MAX_ID_LENGTH:
        return f"must be at most {MAX_ID_LENGTH} characters, has {len(value)}"
    if value in (".", ".."):
        return "must not be . or .."
    found = _FORBIDDEN.search(value)
    if found is None:
        return None
    return f"must not contain {'/' if found[0] == '/' else f'the character U+{ord(found[0]):04X}'}"
