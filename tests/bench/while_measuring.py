"""Warm reads while a worker measures data quality over 100,000 users, against the same reads without."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from threading import Event
from time import perf_counter
from typing import NamedTuple

import redis
import uvloop

from app.bootstrap.service import open_service
from app.profiles.codec import Value, encode
from app.profiles.ports import Cell
from app.settings import Settings
from app.stores.valkey.cache import key
from tests.bench.ground import Ground, add_users
from tests.bench.reads_beside import reads_beside
from tests.bench.timing import Comparison, Result
from tests.support.registry import REGISTRY

USERS, EVENTS = 100_000, 12
PER_WRITE = 2_000


class Walked(NamedTuple):
    """How many users were looked at, and how long a user took, rests included."""

    users: int
    seconds: float


def measure(ground: Ground) -> Iterator[Result]:
    """p99 of a read while the survey goes round, and what a user of it costs."""
    users = add_users(ground.settings.database, "measured", USERS, EVENTS, ground.now_ms)
    uvloop.run(_fill(ground, users))
    walks: list[Walked] = []
    what = f"quality of {USERS:,} users being measured"
    yield from reads_beside(ground, lambda: _measuring(ground.settings, walks), what, 2)
    beside = sum(walk.seconds for walk in walks) / sum(walk.users for walk in walks)
    alone = uvloop.run(_walk(ground.settings, None, None))
    name = f"survey of data quality, per user of {USERS:,}, rests included, beside full load"
    yield Comparison(name, "the same on an idle machine", alone.seconds / alone.users, beside)


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


def _measure(begun: Event, over: Event, settings: Settings) -> Walked:
    return uvloop.run(_walk(settings, begun, over))


async def _walk(settings: Settings, begun: Event | None, over: Event | None) -> Walked:
    """What a worker's job does, until it is over: a whole walk where nobody says so."""
    async with open_service(settings, door="bench") as opened:
        surveyor = opened.quality.surveyor
        survey = await surveyor.begin()
        if begun is not None:
            begun.set()
        started = perf_counter()
        async for _ in surveyor.pages(survey):
            if over is not None and over.is_set():
                break
        if not survey.measured or survey.eligible == 0:
            raise AssertionError("the cache was not measured")
        return Walked(survey.walked, perf_counter() - started)


@contextmanager
def _measuring(settings: Settings, walks: list[Walked]) -> Iterator[None]:
    """The survey goes on in a process of its own until the block ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, Manager() as shared:
        over = shared.Event()
        begun = shared.Event()
        walking = pool.submit(_measure, begun, over, settings)
        begun.wait(30)
        try:
            yield
        finally:
            over.set()
            walks.append(walking.result(60))
