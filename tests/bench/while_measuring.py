"""Warm reads while a worker measures the data quality of a sample of 100,000 users, against the same reads without."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from statistics import median
from threading import Event
from time import perf_counter
from typing import NamedTuple

import redis
import uvloop

from app.bootstrap.service import open_service
from app.profiles.codec import Value, encode
from app.profiles.ports import Cell
from app.settings import Settings
from app.stores.queue.worker import Pace
from app.stores.valkey.cache import key
from tests.bench.ground import Ground, add_users
from tests.bench.reads_beside import reads_beside
from tests.bench.timing import Comparison, Result
from tests.support.registry import REGISTRY

USERS, EVENTS = 100_000, 12
PER_WRITE = 2_000
WORKER_S = 0.8 * Pace().work_s


class Measured(NamedTuple):
    """How many users were measured, and how long a measurement took."""

    users: int
    seconds: float


def measure(ground: Ground) -> Iterator[Result]:
    """p99 of a read while a worker measures again and again, and how long one measurement takes."""
    users = add_users(ground.settings.database, "measured", USERS, EVENTS, ground.now_ms)
    uvloop.run(_fill(ground, users))
    beside: list[Measured] = []
    what = f"quality of a sample of {USERS:,} users being measured"
    yield from reads_beside(ground, lambda: _measuring(ground.settings, beside), what, 2)
    alone = uvloop.run(_once(ground.settings, 600))
    print(f"{alone.users:,} users were measured in {alone.seconds:.1f} s on an idle machine;", file=sys.stderr)
    print(f"beside full load {median(each.users for each in beside):,} in {WORKER_S} s at most", file=sys.stderr)
    name = f"measurement of data quality, per user measured of {USERS:,}, pauses included, beside full load"
    per_user = median(each.seconds / each.users for each in beside)
    yield Comparison(name, "the same on an idle machine", alone.seconds / alone.users, per_user)


async def _fill(ground: Ground, users: list[str]) -> None:
    """A live value of every feature of every user: past the protocol, which would take a minute."""
    async with open_service(ground.settings, door="bench") as opened:
        epoch, _ = await opened.cache.read([Cell("nobody", "nothing")])
        until_ms = ground.now_ms + 3_600_000
        values = {
            entry.name: encode(Value(entry.fingerprint.encode(), 10**9, ground.now_ms, until_ms, b"1"))
            for entry in REGISTRY
        }
        with redis.Redis.from_url(ground.settings.cache_url or "") as client:
            for start in range(0, len(users), PER_WRITE):
                page = users[start : start + PER_WRITE]
                client.mset({key(epoch, Cell(user, name)): raw for user in page for name, raw in values.items()})


async def _once(settings: Settings, budget_s: float) -> Measured:
    """What a worker's job does."""
    async with open_service(settings, door="bench") as opened:
        started = perf_counter()
        report = await opened.quality.measurement.measure(budget_s)
        if not report.cache_answered:
            raise AssertionError("the cache was not measured")
        return Measured(report.measured, perf_counter() - started)


def _again_and_again(begun: Event, over: Event, settings: Settings) -> list[Measured]:
    begun.set()
    found: list[Measured] = []
    while not over.is_set():
        found.append(uvloop.run(_once(settings, WORKER_S)))
    return found


@contextmanager
def _measuring(settings: Settings, measured: list[Measured]) -> Iterator[None]:
    """Measurements follow on each other in a process of its own until the block ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, Manager() as shared:
        over = shared.Event()
        begun = shared.Event()
        measuring = pool.submit(_again_and_again, begun, over, settings)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
            measured += measuring.result(120)
