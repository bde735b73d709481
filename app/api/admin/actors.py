"""Who acts, and what the audit trail keeps of whom they act on."""

from __future__ import annotations

import hashlib

from app.api.auth import Caller
from app.api.context import HttpRequest


def caller(request: HttpRequest) -> Caller:
    """Who asks."""
    known: Caller = request.scope["user"]
    return known


def user_hash(user_id: str) -> str:
    """What the audit trail keeps of a user, who may be erased one day, or was just now."""
    return "user-sha256:" + hashlib.sha256(user_id.encode()).hexdigest()
