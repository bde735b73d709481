"""Judges the keys, as far as their digests tell: a digest hides a key only where nobody can guess it."""

from __future__ import annotations

from collections.abc import Sequence

from app.operations.doctor.facts import Line
from app.settings import Settings, hash_key, is_loopback
from app.settings.parsers import ApiKey

WORDS = (
    *(
        "",
        "key",
        "api",
        "apikey",
        "api-key",
        "api_key",
        "secret",
        "password",
        "pass",
        "passwd",
        "token",
        "test",
        "testing",
    ),
    *("admin", "administrator", "root", "user", "guest", "default", "demo", "dev", "development", "prod", "production"),
    *("read", "write", "reader", "writer", "profiles", "profile", "recommender", "worker", "changeme", "change-me"),
    *("letmein", "welcome", "hello", "qwerty", "abc123", "123", "1234", "12345", "123456", "12345678", "123456789"),
)
REMEDY = "Make a new one with `profiles keys new`, and take this one out of PROFILES_API_KEYS."


def diagnose_keys(settings: Settings) -> list[Line]:
    """Lines about who may come in."""
    keys = settings.api_keys
    if not keys:
        if is_loopback(settings.host):
            text = "there are none: everyone on this machine may do everything"
            return [Line("keys", "warn", text, "Set PROFILES_API_KEYS, unless this machine is yours alone.")]
        text = f"there are none, and PROFILES_HOST is {settings.host}: the service refuses to start"
        return [Line("keys", "bad", text, "Make one with `profiles keys new`.")]
    weak = [
        Line("weak keys", "bad", f"the key {name} is a word that anybody would try", REMEDY) for name in _weak(keys)
    ]
    return [_admin(keys), *(weak or [Line("weak keys", "ok", f"none of {len(keys)} is one of the common words")])]


def _admin(keys: Sequence[ApiKey]) -> Line:
    admins = [key.name for key in keys if "admin" in key.scopes]
    if not admins:
        remedy = "Make one with `profiles keys new NAME --scope admin`."
        return Line("keys", "warn", "none has the scope admin: nobody can sign in to the pages", remedy)
    return Line("keys", "ok", f"{len(keys)}, of which {len(admins)} with the scope admin")


def _weak(keys: Sequence[ApiKey]) -> list[str]:
    words = {*WORDS, *(key.name for key in keys)}
    digests = {hash_key(form) for word in words for form in (word, word.upper(), word.capitalize())}
    return [key.name for key in keys if key.sha256 in digests]
