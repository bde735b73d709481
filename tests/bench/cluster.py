"""A batch read of cached values from the three masters of a cluster, against the same from one server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import uvloop

from app.features.clock import SystemClock
from app.profiles.ports import Cell, Fill, Row
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.registration import InMemoryState, ServerRegistration
from app.telemetry import Metrics
from tests.bench.comparison import Comparison, compare
from tests.bench.environment import Environment
from tests.support.cluster import ClusterServers
from tests.support.processes import free_port
from tests.support.registry import REGISTRY
from tests.support.servers import OPTIONS, binary

USERS = 256
VALUE = b"V0123abcd:7:1760000000000:1760000000001:0.123456"


def measure(environment: Environment) -> Iterator[Comparison]:
    """Seconds per batch."""
    with ExitStack() as stack:

        def start(flavour: str, *, port: int, options: tuple[str, ...] = ()) -> EmbeddedServer:
            directory = environment.settings.directory / str(port)
            socket = directory.with_suffix(".sock")
            server = EmbeddedServer(directory, socket, (*OPTIONS, *options), binary=binary(flavour), port=port)
            stack.callback(server.kill)
            server.start()
            return server

        one = start("valkey", port=free_port())
        cluster = ClusterServers(start, "valkey")
        yield uvloop.run(_batch(f"redis://127.0.0.1:{one.port}/0", cluster.url))


async def _batch(one_url: str, cluster_url: str) -> Comparison:
    rows: list[Row] = [(f"user-{number:05}", tuple(map(str.encode, REGISTRY.names))) for number in range(USERS)]
    one, three = [await _filled(url, rows) for url in (one_url, cluster_url)]
    try:
        return await compare(
            f"cached values of {USERS} users, three masters",
            "one server",
            lambda: one.read_rows(rows),
            lambda: three.read_rows(rows),
            repeat=100,
            at_most=2,
        )
    finally:
        await one.close()
        await three.close()


async def _filled(url: str, rows: list[Row]) -> ValkeyCache:
    """A cache that has a value of each feature of each user."""
    state, clock = InMemoryState("bench"), SystemClock()
    registration = ServerRegistration(state, state.store, clock)
    cache = ValkeyCache(
        url=url, registration=registration, timeout_ms=5_000, lease_ms=60_000, clock=clock, metrics=Metrics()
    )
    await cache.open()
    for user_id, features in rows:
        cells = [Cell(user_id, feature.decode()) for feature in features]
        epoch, _ = await cache.read(cells)
        tokens = await cache.lease(epoch, cells)
        await cache.fill(epoch, [Fill(*parts, VALUE, 600_000) for parts in zip(cells, tokens, strict=True)])
    _, held = await cache.read_rows(rows)
    assert all(value == VALUE for value in held)
    return cache
