"""From an event on the queue to the deleted key, against a bare arq worker whose only job deletes a key.

Both have the same poll delay and the same rate of jobs. The server reports when a key is deleted (keyspace
notifications).
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable, Iterator
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import uvloop
from arq.connections import ArqRedis, create_pool
from redis.asyncio import Redis

from app.bootstrap.service import open_service
from app.features.clock import rfc3339
from app.settings import Settings
from app.stores.queue.jobs import TIP_EVENTS
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.reference_servers import redis_settings
from tests.bench.servers import process_environment, running
from tests.support.queue import connect
from tests.support.registry import REGISTRY

RATE = 100
JOBS = 300
ROUNDS = 3
FEATURE = b"tip_volume_30d"


def measure(environment: Environment) -> Iterator[Comparison]:
    yield uvloop.run(_measure(environment))


async def _measure(environment: Environment) -> Comparison:
    settings, url = environment.settings, environment.reference_url
    worker = {**process_environment(settings), "PROFILES_WORKER_METRICS_PORT": "0"}
    reference: list[float] = []
    ours: list[float] = []
    with (
        running([sys.executable, "-m", "app", "worker"], worker),
        running([sys.executable, "-m", "tests.bench.reference_servers", "arq", url], {}),
    ):
        for number in range(ROUNDS + 1):
            reference.append(quantiles(await _bare(url, str(number)), n=100)[98])
            ours.append(quantiles(await _events(settings, environment.now_ms, str(number)), n=100)[98])
    # The first round includes the start of the workers.
    name = f"queue event to deleted key, {RATE}/s, p99"
    return Comparison(name, "bare arq job", median(reference[1:]), median(ours[1:]), 2.0)


async def _bare(url: str, run: str) -> list[float]:
    pool = await create_pool(redis_settings(url))
    names = [f"bare-{run}-{number}" for number in range(JOBS)]
    try:
        await pool.mset(dict.fromkeys(names, "x"))
        enqueue = functools.partial(pool.enqueue_job, "delete_key")
        return await _lags(pool, names, lambda name: name.encode(), enqueue)
    finally:
        await pool.aclose(close_connection_pool=True)


async def _events(settings: Settings, now_ms: int, run: str) -> list[float]:
    users = [f"lag-{run}-{number}" for number in range(JOBS)]
    assert settings.queue_url is not None
    queue: ArqRedis = connect(settings.queue_url)
    cache: Any = Redis.from_url(settings.cache_url or "")

    def enqueue(user: str) -> Awaitable[Any]:
        event = {
            "subject": "signals.tip.served",
            "event_id": user,
            "user_id": user,
            "tip_id": "tip",
            "occurred_at": rfc3339(now_ms),
        }
        return queue.enqueue_job(TIP_EVENTS, [event])

    try:
        async with open_service(settings, door="bench") as service:
            await service.reader.read(dict.fromkeys(users, REGISTRY.full_mask))
        return await _lags(cache, users, lambda user: b"{%b}:%b" % (user.encode(), FEATURE), enqueue)
    finally:
        await queue.aclose(close_connection_pool=True)
        await cache.aclose()


async def _lags(
    server: Any,
    names: list[str],
    ending: Callable[[str], bytes],
    enqueue: Callable[[str], Awaitable[Any]],
) -> list[float]:
    """Seconds from enqueueing each job to the deletion of the key with that ending."""
    await server.config_set("notify-keyspace-events", "Eg")
    waiting = {ending(name): name for name in names}
    gone: dict[str, float] = {}
    async with server.pubsub() as notices:
        await notices.psubscribe("__keyevent@*__:del")

        async def listen() -> None:
            async for notice in notices.listen():
                key = notice["data"]
                if not isinstance(key, bytes):
                    continue
                name = waiting.get(key[key.find(b"{") :] if b"{" in key else key)
                if name is not None:
                    gone.setdefault(name, perf_counter())
                    if len(gone) == len(names):
                        return

        listening = asyncio.create_task(listen())
        sent: dict[str, float] = {}
        begun = perf_counter()
        for place, name in enumerate(names):
            await asyncio.sleep(max(0.0, begun + place / RATE - perf_counter()))
            sent[name] = perf_counter()
            await enqueue(name)
        async with asyncio.timeout(30):
            await listening
    return [gone[name] - sent[name] for name in names]
