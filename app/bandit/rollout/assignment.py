"""Which users the challenger serves: a fixed place for each user, so that a share only ever adds users.

A user's place in [0, 1) depends on the id alone: the same in every process, today and next year. Who is served by the
challenger at 5 % still is at 25 %. The salt keeps the places apart from any other hash of ids; changing it would deal
all users anew.
"""

from __future__ import annotations

import hashlib

_SALT = b"profiles:rollout:1:"
_BITS = 53  # as many as a float holds


def share_of(user_id: str) -> float:
    """The user's place, uniform on [0, 1) over users."""
    digest = hashlib.sha256(_SALT + user_id.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _BITS)) / (1 << _BITS)


def serves_challenger(user_id: str, share: float) -> bool:
    """Whether the challenger serves this user if it serves this share of users, from 0 (none) to 1 (all)."""
    return share_of(user_id) < share
