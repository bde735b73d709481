"""Caches on real servers, and operations on the servers behind them."""

import itertools
from collections.abc import Callable
from typing import Any, Self

from app.features.ids import hash_slot
from app.profiles.ports import Cell, Epoch
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.registration import InMemoryState, ServerRegistration, owners
from app.telemetry import Metrics
from tests.support.clock import FakeClock, no_pause
from tests.support.cluster import ClusterServers
from tests.support.servers import ask

LEASE_MS = 60_000
_nonces = itertools.count(1)


async def valkey_cache(
    server: EmbeddedServer | None = None,
    *,
    database_id: str = "database",
    timeout_ms: int = 5_000,
    lease_ms: int = LEASE_MS,
    metrics: Metrics | None = None,
    nonce: Callable[[], bytes] | None = None,
    url: str | None = None,
) -> ValkeyCache:
    """The opened cache of one process on a server, or at a URL, with numbered nonces. The caller closes it."""
    state, clock = InMemoryState(database_id), FakeClock()
    cache = ValkeyCache(
        url=url or (server.url if server is not None else ""),
        registration=ServerRegistration(state, state.store, clock, no_pause),
        timeout_ms=timeout_ms,
        lease_ms=lease_ms,
        nonce=nonce or (lambda: b"%d" % next(_nonces)),
        clock=clock,
        metrics=metrics or Metrics(),
    )
    await cache.open()
    return cache


class ServerSubject:
    """A real server, for the contract tests of the cache."""

    def __init__(self, server: EmbeddedServer, url: str | None = None) -> None:
        self.server = server
        self._url = url
        self._caches: list[ValkeyCache] = []
        self.cache: ValkeyCache

    async def open(self) -> Self:
        self.cache = await self.process()
        return self

    async def process(self, database_id: str = "database") -> ValkeyCache:
        """The cache of another process, with its own connections."""
        self._caches.append(await valkey_cache(self.server, database_id=database_id, url=self._url))
        return self._caches[-1]

    def put(self, epoch: Epoch, cell: Cell, raw: bytes, ttl_ms: int = LEASE_MS) -> None:
        self._ask("SET", epoch, cell, raw, "PX", ttl_ms)

    def pttl(self, epoch: Epoch, cell: Cell) -> int:
        return int(self._ask("PTTL", epoch, cell))

    def expire(self, epoch: Epoch, cell: Cell) -> None:
        """Set the TTL to zero, which the server handles as an expiry."""
        self._ask("PEXPIRE", epoch, cell, 0)

    def flush(self) -> None:
        ask(self.server, "FLUSHALL")

    def restart(self) -> None:
        """Kill the server and start it from a dump."""
        ask(self.server, "SAVE")
        self.server.kill()
        self.server.start()

    def _ask(self, command: str, epoch: Epoch, cell: Cell, *arguments: bytes | str | int) -> Any:
        return ask(self.server, command, key(epoch, cell), *arguments)

    async def close(self) -> None:
        for cache in self._caches:
            await cache.close()


class ClusterSubject(ServerSubject):
    """A cluster, for the same tests."""

    def __init__(self, cluster: ClusterServers) -> None:
        self._cluster = cluster
        super().__init__(cluster.servers[0], cluster.url)

    def flush(self) -> None:
        self._cluster.flush()

    def _ask(self, command: str, epoch: Epoch, cell: Cell, *arguments: bytes | str | int) -> Any:
        slot = hash_slot(cell.user_id)
        owner = owners(epoch)[slot]
        assert owner is not None
        return ask(self._cluster.owner(slot), command, key(owner.epoch, cell), *arguments)
