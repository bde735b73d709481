"""Warm reads while a worker rebuilds everyone, against the same reads without."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import Manager, get_context
from threading import Event

import uvloop

from app.bootstrap.service import open_service
from app.profiles.rebuild.runs import CHUNK
from app.settings import Settings
from tests.bench.ground import Ground
from tests.bench.reads_beside import reads_beside
from tests.bench.timing import Result
from tests.support.registry import REGISTRY


def measure(ground: Ground) -> Iterator[Result]:
    """p99 of a read while everything is rebuilt."""
    yield from reads_beside(ground, lambda: _rebuilding(ground.settings, ground.users), "everyone being rebuilt", 3)


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
