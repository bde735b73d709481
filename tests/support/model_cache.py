"""The cache as the protocol means it: a dict with expiries, an epoch, and nothing else.

The contract suite holds this and both servers to the same rules, so that what is tested on the model is true of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence

from app.errors import CacheRefused, CacheUnavailable
from app.profiles.codec import LEASE
from app.profiles.ports import Cell, Epoch, Fill, Row
from tests.support.clock import FakeClock


class ModelServer:
    """What the processes share: contents by (epoch, cell), each with the moment it expires."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.contents: dict[tuple[Epoch, Cell], tuple[bytes, float]] = {}
        self.starts = 1
        self.answering = True
        self.writable = True
        self.full = False

    def get(self, epoch: Epoch, cell: Cell) -> bytes | None:
        """The bytes, unless they expired."""
        held = self.contents.get((epoch, cell))
        if held is None or held[1] <= self.clock.monotonic():
            self.contents.pop((epoch, cell), None)
            return None
        return held[0]

    def put(self, epoch: Epoch, cell: Cell, raw: bytes, ttl_ms: int) -> None:
        """Store unconditionally."""
        self.contents[epoch, cell] = (raw, self.clock.monotonic() + ttl_ms / 1000)

    def restart(self, contents: dict[tuple[Epoch, Cell], tuple[bytes, float]] | None = None) -> None:
        """A new run, with whatever contents; empty by default."""
        self.starts += 1
        self.contents = dict(contents or {})


class ModelCache:
    """Implements `app.profiles.ports.Cache`: one process's view of a `ModelServer`."""

    def __init__(self, server: ModelServer, database_id: str, lease_ms: int) -> None:
        self._server = server
        self._database_id = database_id
        self._lease_ms = lease_ms
        self._numbers = itertools.count(1)

    @property
    def available(self) -> bool:
        """The model has no breaker."""
        return True

    @property
    def _epoch(self) -> Epoch:
        return hashlib.sha256(f"{self._database_id}:{self._server.starts}".encode()).hexdigest()[:12]

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """MGET."""
        self._ask()
        return self._epoch, [self._server.get(self._epoch, cell) for cell in cells]

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """MGET."""
        return await self.read([Cell(user_id, feature.decode()) for user_id, names in rows for feature in names])

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """SET NX GET."""
        if not cells:
            return []
        self._ask(epoch, growing=True)
        tokens: list[bytes] = []
        for cell in cells:
            held = self._server.get(epoch, cell)
            if held is None:
                held = LEASE + b"model.%d.%d" % (id(self), next(self._numbers))
                self._server.put(epoch, cell, held, self._lease_ms)
            tokens.append(held)
        return tokens

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Compare and set."""
        self._ask(epoch, growing=True)
        landed: list[bool] = []
        for fill in fills:
            landed.append(self._server.get(epoch, fill.cell) == fill.token)
            if landed[-1]:
                self._server.put(epoch, fill.cell, fill.value, fill.ttl_ms)
        return landed

    async def drop(self, cells: Collection[Cell]) -> None:
        """DEL."""
        if not cells:
            return
        self._ask(writing=True)
        for cell in cells:
            self._server.contents.pop((self._epoch, cell), None)

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """Compare and delete."""
        self._ask(epoch, writing=True)
        found = [cell for cell, raw in held if self._server.get(epoch, cell) == raw]
        for cell in found:
            del self._server.contents[epoch, cell]
        return len(found)

    async def close(self) -> None:
        """Nothing to close."""

    def _ask(self, epoch: Epoch | None = None, *, writing: bool = False, growing: bool = False) -> None:
        if not self._server.answering:
            raise CacheUnavailable("silent")
        if epoch is not None and epoch != self._epoch:
            raise CacheRefused("restarted meanwhile")
        if (writing or growing) and not self._server.writable:
            raise CacheRefused("READONLY")
        if growing and self._server.full:
            raise CacheRefused("OOM")
