"""Warm reads with many other keys in the cache, against the same reads with few."""

from collections.abc import Iterator

import redis

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import Target, alternately, cost, middle
from tests.bench.servers import constant, service, singles, warm_up, without_local_cache

ROUNDS = 5
CONNECTIONS = 8
FEW, MANY = 5_000, 1_000_000
PER_WRITE = 20_000
VALUE = "V01234567:123456:1777118400000:1777121883420:0.5"


def measure(environment: Environment) -> Iterator[Comparison]:
    """The sizes cannot alternate, so the result is corrected by the drift of a bare constant between them."""
    with constant() as bare, service(without_local_cache(environment.settings)) as port:
        warm_up(port, environment.users)
        targets = [Target(each, singles(environment.users)) for each in (bare, port)]
        few = [middle(loads, cost) for loads in alternately(targets, CONNECTIONS, rounds=ROUNDS)]
        with redis.Redis.from_url(environment.cache_url) as client:
            for start in range(FEW, MANY, PER_WRITE):
                numbers = range(start, start + PER_WRITE)
                client.mset({f"pf:0123456789ab:{{more-{n}}}:completion_rate_30d": VALUE for n in numbers})
        many = [middle(loads, cost) for loads in alternately(targets, CONNECTIONS, rounds=ROUNDS)]
    corrected = few[1] * many[0] / few[0]
    yield Comparison(f"warm read from the server, {MANY:,} keys in the cache", f"{FEW:,} keys", corrected, many[1], 1.2)
