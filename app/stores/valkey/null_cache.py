"""A stand-in for the cache in a process without one, so that every read is computed in the database."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

from app.errors import CacheUnavailable
from app.profiles.ports import Cell, Epoch, Fill, Row


class NullCache:
    """A cache that is never available: each command raises. Implements `app.profiles.ports.Cache`."""

    available = False

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        _refuse()

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        _refuse()

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        _refuse()

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        _refuse()

    async def drop(self, cells: Collection[Cell]) -> None:
        _refuse()

    async def drop_user(self, user_id: str) -> None:
        _refuse()

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        _refuse()

    async def ping(self) -> None:
        _refuse()

    async def check(self) -> None:
        _refuse()

    async def open(self) -> None:
        """Do nothing, because there is no server."""

    async def close(self) -> None:
        """Do nothing, because nothing was opened."""


def _refuse() -> NoReturn:
    raise CacheUnavailable("no cache is set (PROFILES_CACHE_URL)")
