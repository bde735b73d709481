"""Reads with a share of cache hits, against reads that all hit.

A miss is a read of a user that was not read since the cache was emptied. The counters of the service show afterwards
whether the share was right.
"""

import asyncio
from collections.abc import Iterator, Sequence

import redis

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import Load, cost, get, middle, p50, p99, wrk
from tests.bench.servers import KEY, service, singles, warm_up
from tests.support.bulk_users import add_users
from tests.support.fleet import counted
from tests.support.registry import REGISTRY

SHARES = (1.0, 0.99, 0.9, 0.5, 0.0)
ROUNDS = 3
CONNECTIONS = 8
SECONDS = 2
NEW_USERS, EVENTS = 20_000, 20
SENT_AT_MOST = 60_000
TOLERANCE = 0.02


def measure(environment: Environment) -> Iterator[Comparison]:
    new = add_users(environment.settings.require_file(), "new", NEW_USERS, EVENTS, environment.now_ms)
    loads: dict[float, list[Load]] = {}
    with service(environment.settings) as port, redis.Redis.from_url(environment.cache_url) as cache:
        for share in SHARES:
            requests = _mixed(environment.users, new, share)
            for _ in range(ROUNDS):
                cache.flushall()
                warm_up(port, environment.users)
                before = _hits_and_lookups(port)
                loads.setdefault(share, []).append(wrk(port, requests, CONNECTIONS, SECONDS))
                _check(share, before, _hits_and_lookups(port))
    for share in SHARES[1:]:
        for name, figure in (("per request", cost), ("p50", p50), ("p99", p99)):
            reference, ours = middle(loads[1.0], figure), middle(loads[share], figure)
            yield Comparison(
                f"reads with {share:.0%} hits, {CONNECTIONS} connections, {name}", "all hits", reference, ours
            )


def _mixed(known: Sequence[str], new: Sequence[str], share: float) -> list[bytes]:
    """Requests, evenly mixed, of which `share` are for known users; each new user is read once."""
    hits = singles(known)
    if share == 1:
        return hits
    total = min(SENT_AT_MOST, int(len(new) / (1 - share)))
    requests: list[bytes] = []
    missed = 0
    for number in range(total):
        if int((number + 1) * (1 - share) + 1e-9) > missed:
            requests.append(get(f"/profiles/{new[missed]}", KEY))
            missed += 1
        else:
            requests.append(hits[number % len(hits)])
    return requests


def _hits_and_lookups(port: int) -> tuple[float, float]:
    hits, misses = (asyncio.run(counted(port, f"cache_{kind}_total")) for kind in ("hits", "misses"))
    return hits, hits + misses


def _check(share: float, before: tuple[float, float], after: tuple[float, float]) -> None:
    """Raise if the share was missed, as it would be if the requests were repeated: new users would be hits then."""
    hits, lookups = (later - earlier for earlier, later in zip(before, after, strict=True))
    assert lookups >= len(REGISTRY.names)
    if abs(hits / lookups - share) > TOLERANCE:
        raise AssertionError(f"{hits / lookups:.3f} of the reads were hits instead of {share}")
