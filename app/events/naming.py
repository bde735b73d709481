"""Decides whether a payload that never became an event names a user. Erasing the user then erases the payload, too.

If the payload has a field `user_id`, `userId`, `user` or `uid` at any depth, these fields decide. A payload without one
(text, bytes, a pickle) names every user whose id occurs in it as a word: it is better to erase too much than too
little.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_OWNER = frozenset({"userid", "user", "uid"})
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")  # an undecodable byte, as `backslashreplace` writes it


def names(value: object, user_id: str) -> bool:
    """Whether a payload, decoded from JSON or msgpack, names this user or may do so."""
    parts = list(_parts(value))
    owners = {str(part) for key, part in parts if _plain(key) in _OWNER and isinstance(part, str | int)}
    if owners:
        return user_id in owners
    return any(_in_text(part, user_id) for _, part in parts if isinstance(part, str))


def not_naming(items: Sequence[T], values: Sequence[object], user_id: str) -> list[T]:
    """The items that do not name the user. `values` has the decoded content of each item, in the same order."""
    return [item for item, value in zip(items, values, strict=True) if not names(value, user_id)]


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """Yield every scalar of a nested value as (its key in a dict or "", scalar), and every dict key as ("", key). Not
    recursive, because the sender of a payload chooses its depth."""
    waiting = [("", value)]
    while waiting:
        key, part = waiting.pop()
        if isinstance(part, dict):
            waiting += [("", name) for name in part] + [(str(name), item) for name, item in part.items()]
        elif isinstance(part, list | tuple):
            waiting += [(key, item) for item in part]
        else:
            yield key, part.decode("utf-8", "backslashreplace") if isinstance(part, bytes) else part


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


def _in_text(text: str, user_id: str) -> bool:
    return _is_word_of(user_id, text) or (bool(text) and len(text) % 4 == 0 and _is_word_of(user_id, _unpacked(text)))


def _unpacked(text: str) -> str:
    """Decode base64, in which dead letters hold bytes, to text; empty if `text` is not base64."""
    try:
        return b64decode(text, validate=True).decode("utf-8", "backslashreplace")
    except (Error, ValueError):
        return ""


def _is_word_of(user_id: str, text: str) -> bool:
    text = _ESCAPED.sub("\0", text)
    length = chr(len(user_id.encode()))  # precedes a string in msgpack and in pickles
    start = text.find(user_id)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(user_id) :][:1]
        if before and (before < " " or before == length):
            return True
        if not any(char.isalnum() or char in "-_" for char in before + after):
            return True
        start = text.find(user_id, start + 1)
    return False
