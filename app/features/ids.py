"""Rules for the ids of users, tips, events and decisions, and how ids are shown. An id has 1 to 128 characters without
control characters, surrogates or `/`, and is not `.` or `..`, so that it can be part of a URL path and a log line."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from binascii import crc_hqx
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated
from urllib.parse import quote

from msgspec import Meta

MAX_ID_LENGTH = 128
AFTER_ALL_IDS = "\U0010ffff" * (MAX_ID_LENGTH + 1)  # in the order of UTF-8 bytes, which both databases use
HASH_SLOTS = 16_384
ID_PATTERN = r"^(?!\.{1,2}$)[^/\x00-\x1f\x7f-\x9f]+$"  # for JSON Schema; `id_problem` decides
_PLAIN_IN_KEY = re.compile(r"[A-Za-z0-9\-._~@:]*").fullmatch
_FORBIDDEN = re.compile("[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ALLOWED_LINES = re.compile(r"(?:(?!\.{1,2}\n)[^/\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}\n)*+").fullmatch
# Unicode categories without a glyph, and letters, marks and a symbol that are drawn as nothing.
_HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
_DRAWN_AS_NOTHING = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

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
    """The reason why `value` is not allowed as an id; None if it is allowed."""
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


def all_allowed(ids: Sequence[str]) -> bool:
    """Whether every id is allowed. For a hundred ids, five times as fast as a call of `id_problem` for each."""
    lines = "\n".join([*ids, ""])
    return lines.count("\n") == len(ids) and _ALLOWED_LINES(lines) is not None


def user_hash(user_id: str) -> str:
    """A hash that names a user in the log and the audit trail, so that they hold no id after the user is erased."""
    return "user-sha256:" + hashlib.sha256(user_id.encode()).hexdigest()


def quoted_in_key(user_id: str) -> str:
    """The percent-encoded id, as it stands between braces in cache keys."""
    return user_id if _PLAIN_IN_KEY(user_id) else quote(user_id, safe="-._~@:")


@lru_cache(maxsize=1 << 16)
def hash_slot(user_id: str) -> int:
    """The hash slot that has the user's keys in a Redis or Valkey Cluster: the CRC-16 of their hash tag."""
    return crc_hqx(quoted_in_key(user_id).encode(), 0) % HASH_SLOTS


def visible(text: str, *, layout: bool = False) -> str:
    """Replace characters that a reader cannot see by a code such as `⟨U+200B⟩`, so that different texts look different:
    control, format and bidirectional characters, blanks at an end or after another blank, and combining accents for
    which a precomposed character exists. With `layout`, blanks, tabs and line breaks are kept."""
    if text.isascii() and text.isprintable() and (layout or " ".join(text.split()) == text):
        return text
    composed = unicodedata.is_normalized("NFC", text)
    ends = (0, len(text) - 1)

    def hidden(place: int, char: str) -> bool:
        if layout and char in " \t\n":
            return False
        if char == " ":
            return place in ends or text[place - 1] == " "
        if not composed and not unicodedata.is_normalized("NFC", text[max(0, place - 1) : place + 1]):
            return True
        if unicodedata.combining(char):
            return place == 0 or not composed
        # Including the bracket, so that no id can imitate a code.
        return char == "⟨" or unicodedata.category(char) in _HIDDEN or bool(_DRAWN_AS_NOTHING.match(char))

    return "".join(f"⟨U+{ord(char):04X}⟩" if hidden(place, char) else char for place, char in enumerate(text))
