"""A stand-in for the cache in a process without one, so that every read is computed in the database."""

from __future__ import annotations

from typing import NoReturn

from app.errors import CacheUnavailable


class NullCache:
    """A cache that is never available: each command raises. Implements `app.profiles.ports.Cache`."""

    available = False

    async def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise CacheUnavailable("no cache is set (PROFILES_CACHE_URL)")

    read = read_rows = lease = fill = drop = drop_user = drop_exactly = check = _refuse
