"""Warm reads, single and in batches, with key, metrics and request ids on.

Each is measured twice: as the service is, with frequently read users in the local cache, and without the local cache,
so that every hit comes from the cache server.
"""

from collections.abc import Iterator

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import Target, alternately, cost, middle, p50
from tests.bench.servers import batches, constant, plain_route, service, singles, warm_up, without_local_cache

BARE, PLAIN = "bare ASGI constant", "Litestar + MGET"
BATCH, BATCH_CONNECTIONS = 100, 8


def concurrency(environment: Environment) -> Iterator[Comparison]:
    requests = singles(environment.users)
    with (
        constant() as bare,
        plain_route(environment.cache_url, environment.users) as plain,
        service(environment.settings) as near,
        service(without_local_cache(environment.settings)) as far,
    ):
        warm_up(near, environment.users)
        targets = [Target(port, requests) for port in (bare, plain, near, far)]
        many = [middle(loads, cost) for loads in alternately(targets, 32, rounds=5)]
        one = [middle(loads, p50) for loads in alternately([targets[0], *targets[2:]], 1, rounds=5)]
    for how, ours, alone in (("", many[2], one[1]), (" from the server", many[3], one[2])):
        yield Comparison(f"warm read{how}, 32 connections", BARE, many[0], ours, 2.5)
        yield Comparison(f"warm read{how}, 32 connections", PLAIN, many[1], ours, 1 / 3.5)
        yield Comparison(f"warm read{how}, 1 connection, p50", BARE, one[0], alone, 3)


def batch(environment: Environment) -> Iterator[Comparison]:
    requests = batches(environment.users, BATCH, BATCH // 2)
    with (
        plain_route(environment.cache_url, environment.users) as plain,
        service(environment.settings) as near,
        service(without_local_cache(environment.settings)) as far,
    ):
        warm_up(near, environment.users)
        targets = [Target(port, requests) for port in (plain, near, far)]
        costs = [middle(loads, cost) for loads in alternately(targets, BATCH_CONNECTIONS, rounds=5)]
    for how, ours in (("", costs[1]), (" from the server", costs[2])):
        yield Comparison(f"batch of {BATCH}{how}, {BATCH_CONNECTIONS} connections", PLAIN, costs[0], ours, 1 / 1.5)
