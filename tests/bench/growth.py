"""The cache as it grows: the cost of a warm read over the keys beside it, and the bytes that a user takes."""

from __future__ import annotations

from collections.abc import Iterator

import redis
import uvloop

from app.bootstrap.service import open_service
from app.settings import Settings
from tests.bench.ground import Ground, add_users
from tests.bench.references import key
from tests.bench.serving import (
    Target,
    alternately,
    constant,
    middle,
    p50,
    p99,
    seconds,
    service,
    singles,
    warm,
    without_near,
)
from tests.bench.timing import Comparison, Curve, Result
from tests.support.registry import REGISTRY

ROUNDS = 5
CONNECTIONS = 8
KEYS = (5_000, 100_000, 1_000_000)
PER_WRITE = 20_000
VALUE = "V01234567:123456:1777118400000:1777121883420:0.5"
CACHED_USERS, EVENTS = 5_000, 20


def keys(ground: Ground) -> Iterator[Result]:
    """Warm reads of the same users while other keys come to lie beside theirs.

    The sizes cannot take turns. So a bare constant is loaded in turn with each, and what it became slower or faster by
    is the machine's drift, by which the first size's cost is corrected.
    """
    costs: list[float] = []
    drift: list[float] = []
    latencies: dict[str, list[float]] = {"p50": [], "p99": []}
    with constant() as bare, service(without_near(ground.settings)) as port:
        warm(port, ground.users)
        targets = [Target(bare, singles(ground.users)), Target(port, singles(ground.users))]
        for count in KEYS:
            _grow(ground.settings, count)
            steady, loads = alternately(targets, CONNECTIONS, rounds=ROUNDS)
            drift.append(middle(steady, seconds))
            costs.append(middle(loads, seconds))
            latencies["p50"].append(middle(loads, p50))
            latencies["p99"].append(middle(loads, p99))
    first = costs[0] * drift[-1] / drift[0]
    yield Comparison(
        f"warm read from the server, {KEYS[-1]:,} keys in the cache", f"{KEYS[0]:,} keys", first, costs[-1], 1.2
    )
    name = f"over the keys in the cache, {CONNECTIONS} connections"
    yield Curve(f"latency {name}", "keys", "seconds", KEYS, latencies)


def size(ground: Ground) -> Iterator[Result]:
    """Bytes of the server's memory for a user's features, against the same values as bare strings without a TTL."""
    users = add_users(ground.settings.database, "sized", CACHED_USERS, EVENTS, ground.now_ms)
    with redis.Redis.from_url(ground.settings.cache_url or "") as cache:
        before = _used(cache)
        uvloop.run(_read(ground.settings, users))
        ours = _used(cache) - before
    with redis.Redis.from_url(ground.bare_url) as bare:
        before = _used(bare)
        bare.mset({key(user, name): "0.5" for user in users for name in REGISTRY.names})
        plain = _used(bare) - before
    name = f"memory of the cache, per user of {len(REGISTRY.names)} features"
    yield Comparison(name, "bare strings", plain / len(users), ours / len(users), None, "B")


async def _read(settings: Settings, users: list[str]) -> None:
    async with open_service(settings, door="bench") as opened:
        for start in range(0, len(users), 1_000):
            await opened.reader.read(dict.fromkeys(users[start : start + 1_000], REGISTRY.full_mask))


def _used(client: redis.Redis) -> int:
    held = client.info("memory")
    assert isinstance(held, dict)
    return int(held["used_memory_dataset"]) + int(held["used_memory_overhead"])


def _grow(settings: Settings, count: int) -> None:
    """Keys of the usual size beside the users' own, until there are so many."""
    with redis.Redis.from_url(settings.cache_url or "") as client:
        for start in range(int(client.dbsize()), count, PER_WRITE):
            client.mset(
                {
                    f"pf:0123456789ab:{{more-{number}}}:completion_rate_30d": VALUE
                    for number in range(start, min(start + PER_WRITE, count))
                }
            )
