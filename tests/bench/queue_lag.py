"""From an event on the queue to the deleted key, against a bare arq worker whose only job deletes a key.

Both work at the same poll delay, at the same rate of jobs, and the server itself tells when a key went (keyspace
notifications), so nothing is measured by who is measured.
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
from app.stores.queue.client import TIP_EVENTS, connect
from tests.bench.ground import Ground
from tests.bench.processes import running, told_of
from tests.bench.references import redis_settings
from tests.bench.timing import Comparison, Curve, Result
from tests.support.registry import REGISTRY

RATES = (50, 100, 200, 400, 800)
JOBS = 300
SPAN_S = 2  # at least: a lag that grows shows only in time
ROUNDS = 3
MARK = b"tip_volume_30d"


def measure(ground: Ground) -> Iterator[Result]:
    """p50 and p99 at rising rates of jobs."""
    yield from uvloop.run(_measure(ground.settings, ground.bare_url, ground.now_ms))


async def _measure(settings: Settings, bare_url: str, now_ms: int) -> list[Result]:
    figures: dict[str, list[float]] = {}
    with (
        running([sys.executable, "-m", "app", "worker"], {**told_of(settings), "PROFILES_WORKER_METRICS_PORT": "0"}),
        running([sys.executable, "-m", "tests.bench.references", "arq", bare_url], {}),
    ):
        await _bare(bare_url, "first", RATES[0])
        await _events(settings, now_ms, "first", RATES[0])
        for rate in RATES:
            reference: list[list[float]] = []
            ours: list[list[float]] = []
            for number in range(ROUNDS):
                reference.append(await _bare(bare_url, f"{rate}-{number}", rate))
                ours.append(await _events(settings, now_ms, f"{rate}-{number}", rate))
            for name, figure in (("p50", median), ("p99", _p99)):
                figures.setdefault(f"bare arq job, {name}", []).append(median(figure(taken) for taken in reference))
                figures.setdefault(f"profiles, {name}", []).append(median(figure(taken) for taken in ours))
    place = RATES.index(100)
    results: list[Result] = [
        Comparison(
            f"queue event to deleted key, 100/s, {name}",
            "bare arq job",
            figures[f"bare arq job, {name}"][place],
            figures[f"profiles, {name}"][place],
            floor,
        )
        for name, floor in (("p50", None), ("p99", 2.0))
    ]
    return [*results, Curve("event to deleted key over the rate", "events per second", "seconds", RATES, figures)]


def _p99(taken: list[float]) -> float:
    return quantiles(taken, n=100)[98]


async def _bare(url: str, run: str, rate: int) -> list[float]:
    pool = await create_pool(redis_settings(url))
    names = [f"bare-{run}-{number}" for number in range(max(JOBS, SPAN_S * rate))]
    try:
        await pool.mset(dict.fromkeys(names, "x"))
        enqueue = functools.partial(pool.enqueue_job, "delete_key")
        return await _lags(pool, names, lambda name: name.encode(), enqueue, rate)
    finally:
        await pool.aclose(close_connection_pool=True)


async def _events(settings: Settings, now_ms: int, run: str, rate: int) -> list[float]:
    users = [f"lag-{run}-{number}" for number in range(max(JOBS, SPAN_S * rate))]
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
        return await _lags(cache, users, lambda user: b"{%b}:%b" % (user.encode(), MARK), enqueue, rate)
    finally:
        await queue.aclose(close_connection_pool=True)
        await cache.aclose()


async def _lags(
    server: Any,
    names: list[str],
    ending: Callable[[str], bytes],
    enqueue: Callable[[str], Awaitable[Any]],
    rate: int,
) -> list[float]:
    """Seconds from each enqueueing to the deletion of the key with that ending."""
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
            await asyncio.sleep(max(0.0, begun + place / rate - perf_counter()))
            sent[name] = perf_counter()
            await enqueue(name)
        async with asyncio.timeout(30):
            await listening
    return [gone[name] - sent[name] for name in names]
