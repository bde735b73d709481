"""Reads of which a share finds its profile in the cache, and the rest computes it.

A miss asks for a user whom nobody has asked for since the cache was emptied; the service's own counters say
afterwards whether the share was the one that was meant.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator, Sequence
from statistics import median

import redis

from tests.bench.ground import Ground, add_users
from tests.bench.load import get, wrk
from tests.bench.serving import KEY, service, singles, warm
from tests.bench.timing import Curve, Result
from tests.support.registry import REGISTRY

RATIOS = (0.0, 0.5, 0.9, 0.99, 1.0)
ROUNDS = 3
CONNECTIONS = 8
SECONDS = 2
FRESH, EVENTS = 20_000, 20
SENT_AT_MOST = 60_000
TOLERANCE = 0.02


def measure(ground: Ground) -> Iterator[Result]:
    """Requests per second, p50 and p99 over the share of hits."""
    fresh = add_users(ground.settings.database, "fresh", FRESH, EVENTS, ground.now_ms)
    rates: list[float] = []
    latencies: dict[str, list[float]] = {"p50": [], "p99": []}
    with service(ground.settings) as port, redis.Redis.from_url(ground.settings.cache_url or "") as cache:
        for ratio in RATIOS:
            requests = _mixed(ground.users, fresh, ratio)
            loads = []
            for _ in range(ROUNDS):
                cache.flushall()
                warm(port, ground.users)
                before = _counted(port)
                loads.append(wrk(port, requests, CONNECTIONS, SECONDS))
                _check(ratio, before, _counted(port))
            rates.append(median(load.rate for load in loads))
            latencies["p50"].append(median(load.p50 for load in loads))
            latencies["p99"].append(median(load.p99 for load in loads))
    at = [ratio * 100 for ratio in RATIOS]
    name = f"over the hit ratio, {CONNECTIONS} connections"
    yield Curve(f"throughput {name}", "hits, %", "requests per second", at, {"profiles": rates})
    yield Curve(f"latency {name}", "hits, %", "seconds", at, latencies)


def _mixed(known: Sequence[str], fresh: Sequence[str], ratio: float) -> list[bytes]:
    """Requests of which the share `ratio` is for the known, evenly mixed; each of the fresh is asked for once."""
    hits = singles(known)
    if ratio == 1:
        return hits
    total = min(SENT_AT_MOST, int(len(fresh) / (1 - ratio)))
    requests: list[bytes] = []
    missed = 0
    for number in range(total):
        if int((number + 1) * (1 - ratio) + 1e-9) > missed:
            requests.append(get(f"/profiles/{fresh[missed]}", KEY))
            missed += 1
        else:
            requests.append(hits[number % len(hits)])
    return requests


def _counted(port: int) -> tuple[float, float]:
    """Hits and lookups of features so far."""
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"X-API-Key": KEY}), timeout=10
    ) as answer:
        text = answer.read().decode()
    hits, misses = (
        sum(float(value) for value in re.findall(rf"^profiles_cache_{kind}_total\S* (\S+)$", text, re.MULTILINE))
        for kind in ("hits", "misses")
    )
    return hits, hits + misses


def _check(ratio: float, before: tuple[float, float], after: tuple[float, float]) -> None:
    """The share must have been what was meant; requests for users beyond the fresh ones would be hits."""
    hits, looked = (later - earlier for earlier, later in zip(before, after, strict=True))
    assert looked >= len(REGISTRY.names)
    if abs(hits / looked - ratio) > TOLERANCE:
        raise AssertionError(f"{hits / looked:.3f} of the reads were hits, {ratio} were meant")
