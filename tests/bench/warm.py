"""Warm profiles: over the number of connections, and over the size of a batch; keys, metrics and request ids on.

Twice: as the service is, where users who are read often are near, and with every hit from the cache's server.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.ground import Ground
from tests.bench.load import Load
from tests.bench.serving import (
    Target,
    alternately,
    batches,
    constant,
    middle,
    p50,
    p99,
    plain_route,
    seconds,
    service,
    singles,
    warm,
    without_near,
)
from tests.bench.timing import Comparison, Curve, Result

ROUNDS = 5
CONNECTIONS = (1, 8, 32, 128)
SIZES = (1, 10, 100, 300, 1_000)
BATCH_CONNECTIONS = 8
OURS, FAR, BARE, PLAIN = "profiles", "profiles, from the server", "bare ASGI constant", "Litestar + MGET"
HOW = {OURS: "", FAR: " from the server"}


def concurrency(ground: Ground) -> Iterator[Result]:
    """Single reads: requests per second and latency over connections, beside both references."""
    requests = singles(ground.users)
    with (
        constant() as bare,
        plain_route(ground.settings.cache_url or "", ground.users) as plain,
        service(ground.settings) as ours,
        service(without_near(ground.settings)) as far,
    ):
        warm(ours, ground.users)
        loads: dict[str, list[list[Load]]] = {BARE: [], PLAIN: [], OURS: [], FAR: []}
        for connections in CONNECTIONS:
            targets = [Target(port, requests) for port in (bare, plain, ours, far)]
            for taken, rounds in zip(loads.values(), alternately(targets, connections, rounds=ROUNDS), strict=True):
                taken.append(rounds)
    at = {name: dict(zip(CONNECTIONS, taken, strict=True)) for name, taken in loads.items()}
    cost = {name: middle(at[name][32], seconds) for name in at}
    alone = {name: middle(at[name][1], p50) for name in at}
    for name, how in HOW.items():
        yield Comparison(f"warm read{how}, 32 connections", BARE, cost[BARE], cost[name], 2.5)
        yield Comparison(f"warm read{how}, 32 connections", PLAIN, cost[PLAIN], cost[name], 1 / 3.5)
        yield Comparison(f"warm read{how}, 1 connection, p50", BARE, alone[BARE], alone[name], 3)
    for name, unit, figure in (
        ("throughput", "requests per second", lambda load: load.rate),
        ("latency p50", "seconds", p50),
        ("latency p99", "seconds", p99),
    ):
        series = {who: [middle(rounds, figure) for rounds in taken] for who, taken in loads.items()}
        yield Curve(f"{name} over connections", "connections", unit, CONNECTIONS, series)


def batch(ground: Ground) -> Iterator[Result]:
    """Batches of 1 to 1,000 users."""
    series: dict[str, list[float]] = {}
    cost: dict[str, float] = {}
    with (
        plain_route(ground.settings.cache_url or "", ground.users) as plain,
        service(ground.settings) as ours,
        service(without_near(ground.settings)) as far,
    ):
        warm(ours, ground.users)
        for size in SIZES:
            requests = batches(ground.users, size, max(1, size // 2))
            targets = [Target(port, requests) for port in (plain, ours, far)]
            for name, loads in zip((PLAIN, *HOW), alternately(targets, BATCH_CONNECTIONS, rounds=3), strict=True):
                series.setdefault(f"{name}, p50", []).append(middle(loads, p50))
                series.setdefault(f"{name}, p99", []).append(middle(loads, p99))
                if size == 100:
                    cost[name] = middle(loads, seconds)
    for name, how in HOW.items():
        yield Comparison(f"batch of 100{how}, {BATCH_CONNECTIONS} connections", PLAIN, cost[PLAIN], cost[name], 1 / 1.5)
    yield Curve(
        f"latency over batch size, {BATCH_CONNECTIONS} connections", "users in a batch", "seconds", SIZES, series
    )
