"""Warm reads while a worker measures the data quality of a sample of 100,000 users, against the same reads without."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from threading import Event

import redis
import uvloop

from app.bootstrap.service import open_service
from app.concurrency.tasks import end
from app.profiles.codec import Value, encode
from app.profiles.ports import Cell
from app.settings import Settings
from app.stores.queue.worker import Pace
from app.stores.valkey.cache import key
from tests.bench.ground import Ground, add_users
from tests.bench.reads_beside import reads_beside
from tests.bench.timing import Result
from tests.support.registry import REGISTRY

USERS, EVENTS = 100_000, 12
PER_WRITE = 2_000
WORKER_S = 0.8 * Pace().work_s


def measure(ground: Ground) -> Iterator[Result]:
    """p99 of a read while a worker measures; and how long a measurement takes on an idle machine."""
    users = add_users(ground.settings.database, "measured", USERS, EVENTS, ground.now_ms)
    uvloop.run(_fill(ground, users))
    what = f"quality of a sample of {USERS:,} users being measured"
    yield from reads_beside(ground, lambda: _measuring(ground.settings), what, 2)
    uvloop.run(_once(ground.settings))


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


async def _once(settings: Settings) -> None:
    async with open_service(settings, door="bench") as opened:
        report = await opened.quality.measurement.measure(WORKER_S)
    if not report.cache_answered:
        raise AssertionError("the cache was not measured")
    print(f"{report.measured:,} users were measured in {report.took_s:.1f} s, on an idle machine", file=sys.stderr)


async def _until(over: Event, begun: Event, settings: Settings) -> None:
    """What a worker's job does, again and again."""
    async with open_service(settings, door="bench") as opened:
        begun.set()
        ended = asyncio.create_task(asyncio.to_thread(over.wait))
        while not ended.done():
            measuring = asyncio.create_task(opened.quality.measurement.measure(WORKER_S))
            await asyncio.wait({measuring, ended}, return_when=asyncio.FIRST_COMPLETED)
            await end([measuring])


def _measure(begun: Event, over: Event, settings: Settings) -> None:
    uvloop.run(_until(over, begun, settings))


@contextmanager
def _measuring(settings: Settings) -> Iterator[None]:
    """A process of its own measures until the block ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, Manager() as shared:
        over = shared.Event()
        begun = shared.Event()
        measuring = pool.submit(_measure, begun, over, settings)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
            measuring.result(60)
