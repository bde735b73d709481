"""Warm reads while a worker rebuilds all users or measures data quality, against the same reads without it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from threading import Event
from typing import Any

import redis
import uvloop

from app.bootstrap.service import OpenService, open_service
from app.concurrency.tasks import end
from app.profiles.online.cache_protocol import FeatureValue, encode
from app.profiles.ports import Cell
from app.profiles.rebuild import CHUNK
from app.settings import Settings
from app.stores.valkey.cache import key
from app.worker import MEASURE_S
from tests.bench.comparison import Comparison
from tests.bench.environment import USERS, Environment
from tests.bench.load import Load, middle, p99, wrk
from tests.bench.servers import service, singles, warm_up, without_local_cache
from tests.support.bulk_users import add_users
from tests.support.registry import REGISTRY

ROUNDS = 5
CONNECTIONS = 8
SECONDS = 3
MEASURED, EVENTS = 100_000, 12
PER_WRITE = 2_000

Work = Callable[[OpenService], Coroutine[Any, Any, object]]


def while_rebuilding(environment: Environment) -> Iterator[Comparison]:
    yield from _compare(environment, rebuild_all, "all users being rebuilt", 3)


def while_measuring(environment: Environment) -> Iterator[Comparison]:
    """Also prints how long one measurement takes on an idle machine."""
    users = add_users(environment.settings.require_file(), "measured", MEASURED, EVENTS, environment.now_ms)
    uvloop.run(_fill(environment, users))
    what = f"quality of a sample of {MEASURED:,} users being measured"
    yield from _compare(environment, measure_quality, what, 2)
    uvloop.run(_measure_once(environment.settings))


async def rebuild_all(opened: OpenService) -> None:
    users = [f"user-{number:04d}" for number in range(1, USERS + 1)]
    for start in range(0, len(users), CHUNK):
        await opened.rebuilder.rebuild(users[start : start + CHUNK], REGISTRY.full_mask)


async def measure_quality(opened: OpenService) -> None:
    await opened.quality.measure(MEASURE_S)


def _compare(environment: Environment, work: Work, what: str, limit: float) -> Iterator[Comparison]:
    """p99 of a read, with and without the local cache; `limit` is that of the ratio."""
    reads = singles(environment.users)
    with service(environment.settings) as near, service(without_local_cache(environment.settings)) as far:
        warm_up(near, environment.users)
        ports = {"": near, " from the server": far}
        quiet: dict[str, list[Load]] = {how: [] for how in ports}
        busy: dict[str, list[Load]] = {how: [] for how in ports}
        for _ in range(ROUNDS):
            for how, port in ports.items():
                quiet[how].append(wrk(port, reads, CONNECTIONS, SECONDS))
                with _repeated(environment.settings, work):
                    busy[how].append(wrk(port, reads, CONNECTIONS, SECONDS))
    for how in ports:
        name = f"warm read{how}, {CONNECTIONS} connections, p99, {what}"
        yield Comparison(name, "the same without", middle(quiet[how], p99), middle(busy[how], p99), limit)


@contextmanager
def _repeated(settings: Settings, work: Work) -> Iterator[None]:
    """Repeat the work in a process of its own until the block ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, Manager() as shared:
        begun, over = shared.Event(), shared.Event()
        working = pool.submit(_work, settings, work, begun, over)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
            working.result(60)


def _work(settings: Settings, work: Work, begun: Event, over: Event) -> None:
    async def until_over() -> None:
        async with open_service(settings, door="bench") as opened:
            begun.set()
            ended = asyncio.create_task(asyncio.to_thread(over.wait))
            while not ended.done():
                working = asyncio.create_task(work(opened))
                await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    working.result()
                await end([working])

    uvloop.run(until_over())


async def _fill(environment: Environment, users: list[str]) -> None:
    """Store a live value of every feature of every user directly; reading them all would take a minute."""
    async with open_service(environment.settings, door="bench") as opened:
        epoch, _ = await opened.cache.read([Cell("user-without-events", "tip_volume_30d")])
        until_ms = environment.now_ms + 3_600_000
        values = {
            entry.name: encode(FeatureValue(entry.fingerprint.encode(), 10**9, environment.now_ms, until_ms, b"1"))
            for entry in REGISTRY
        }
        with redis.Redis.from_url(environment.cache_url) as client:
            for start in range(0, len(users), PER_WRITE):
                page = users[start : start + PER_WRITE]
                client.mset({key(epoch, Cell(user, name)): raw for user in page for name, raw in values.items()})


async def _measure_once(settings: Settings) -> None:
    async with open_service(settings, door="bench") as opened:
        report = await opened.quality.measure(MEASURE_S)
    if not report.cache_answered:
        raise AssertionError("the cache was not measured")
    print(f"{report.measured:,} users were measured in {report.took_s:.1f} s on the idle machine", file=sys.stderr)
