"""Warm reads while a worker rebuilds everyone, against the same reads without; and how they fare as the cache grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from statistics import median
from threading import Event

import redis
import uvloop

from app.assembly import open_service
from app.features.definitions import REGISTRY
from app.profiles.rebuild_runs import CHUNK
from app.settings import Settings
from tests.bench.http import KEY, free_port, service
from tests.bench.load import get, post, wrk
from tests.bench.timing import Comparison

ROUNDS = 5
CONNECTIONS = 8
SECONDS = 3
FEW_KEYS, MANY_KEYS = 5_000, 1_000_000
PER_WRITE = 20_000
VALUE = "V01234567:123456:1777118400000:1777121883420:0.5"


def measure(settings: Settings, users: list[str]) -> Iterator[Comparison]:
    """p99 of a read while everything is rebuilt; seconds per read over the number of keys."""
    port = free_port()
    reads = [get(f"/profiles/{user}", KEY) for user in users]
    with service(settings, port):
        wrk(port, [post("/profiles/batch", json.dumps({"user_ids": users}).encode(), KEY)], 1, 1)  # warm
        quiet: list[float] = []
        busy: list[float] = []
        for _ in range(ROUNDS):
            quiet.append(wrk(port, reads, CONNECTIONS, SECONDS).p99)
            with _rebuilding(settings, users):
                busy.append(wrk(port, reads, CONNECTIONS, SECONDS).p99)
        name = f"warm read, {CONNECTIONS} connections, p99, everyone being rebuilt"
        yield Comparison(name, "the same without the rebuild", median(quiet), median(busy), 3)
        few = [1 / wrk(port, reads, CONNECTIONS, SECONDS).rate for _ in range(ROUNDS)]
        _grow(settings)
        many = [1 / wrk(port, reads, CONNECTIONS, SECONDS).rate for _ in range(ROUNDS)]
        yield Comparison(f"warm read, {MANY_KEYS:,} keys", f"{FEW_KEYS:,} keys", median(few), median(many), 1.2)


def _rebuild(begun: Event, over: Event, settings: Settings, users: list[str]) -> int:
    return uvloop.run(_rebuild_until(begun, over, settings, users))


async def _rebuild_until(begun: Event, over: Event, settings: Settings, users: list[str]) -> int:
    """What a worker's job does, over and over; how many users were rebuilt."""
    done = 0
    async with open_service(settings, door="bench") as service:
        begun.set()
        while not over.is_set():
            for start in range(0, len(users), CHUNK):
                await service.rebuilder.rebuild(users[start : start + CHUNK], REGISTRY.full_mask)
                done += CHUNK
                if over.is_set():
                    break
    return done


@contextmanager
def _rebuilding(settings: Settings, users: list[str]) -> Iterator[None]:
    """Everyone is rebuilt, again and again, in a process of its own, until the block ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, Manager() as shared:
        over = shared.Event()
        begun = shared.Event()
        rebuilding = pool.submit(_rebuild, begun, over, settings, users)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
            done = rebuilding.result(30)
    if done < len(users):
        raise AssertionError("not everyone was rebuilt meanwhile")


def _grow(settings: Settings) -> None:
    """Keys of the usual size beside the users' own, until there are many."""
    with redis.Redis.from_url(settings.cache_url or "") as client:
        for start in range(int(client.dbsize()), MANY_KEYS, PER_WRITE):
            client.mset(
                {
                    f"pf:0123456789ab:{{more-{number}}}:completion_rate_30d": VALUE
                    for number in range(start, start + PER_WRITE)
                }
            )
