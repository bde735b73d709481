"""Asks a Redis or Valkey how it is set up, for `profiles doctor`. It leaves nothing behind."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import CacheUnavailable
from app.operations.doctor.facts import ServerFacts, Unreached
from app.stores.queue.client import DATABASES_SUFFIX, SHOWN_MS, health_key
from app.stores.system_clock import SystemClock
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.pool import AWAY, blocking_pool, told
from app.telemetry import Metrics

TIMEOUT_S = 3.0
PROBE_KEY = "profiles:doctor"


async def server_facts(
    url: str, queue: str | None = None, now_s: Callable[[], float] = time.time
) -> ServerFacts | Unreached:
    """What it says of itself: as the server of the named queue, or as the cache.

    `now_s` is our wall clock. Raises `ValueError` where the URL is none.
    """
    client: Any = Redis(connection_pool=blocking_pool(url, TIMEOUT_S, 1, decode_responses=True))
    try:
        found = await _asked(client, queue, now_s)
        return found if queue is not None else found._replace(refuses=await _cache_refusal(url))
    except AWAY as error:
        return Unreached(f"{told(error)} ({type(error).__name__}: {error})")
    finally:
        await client.aclose(close_connection_pool=True)


async def _asked(client: Any, queue: str | None, now_s: Callable[[], float]) -> ServerFacts:
    info: dict[str, Any] = await client.info()
    before_s = now_s()
    seconds, microseconds = await client.time()
    after_s = now_s()
    ahead_s = seconds + microseconds / 1e6 - (before_s + after_s) / 2
    valkey = info.get("valkey_version")
    return ServerFacts(
        flavour="Valkey" if valkey else "Redis",
        version=tuple(int(part) for part in str(valkey or info["redis_version"]).split(".") if part.isdigit()),
        run_id=str(info["run_id"]),
        role="replica" if info["role"] == "slave" else str(info["role"]),
        maxmemory=int(info.get("maxmemory", 0)),
        policy=str(info.get("maxmemory_policy", "noeviction")),
        appends=bool(info.get("aof_enabled")),
        snapshots=await _snapshots(client),
        write_error=_write_error(info),
        refuses=await _refusal(client) if queue is not None else None,
        ahead_ms=round(ahead_s * 1000),
        unsure_ms=round((after_s - before_s) * 500) + 1,
        worker_alive=queue is not None and bool(await client.exists(health_key(queue))),
        databases=await _databases(client, queue, now_s()) if queue is not None else 0,
    )


async def _databases(client: Any, queue: str, now_s: float) -> int:
    return int(await client.zcount(queue + DATABASES_SUFFIX, now_s * 1000 - SHOWN_MS, "+inf"))


async def _snapshots(client: Any) -> bool | None:
    """Hosted servers often do not let one ask."""
    with suppress(ResponseError):
        found: dict[str, str] = await client.config_get("save")
        if "save" in found:
            return bool(found["save"])
    return None


def _write_error(info: dict[str, Any]) -> str | None:
    if info.get("aof_enabled") and info.get("aof_last_write_status") == "err":
        return "the last write of the append-only file failed"
    if info.get("rdb_last_bgsave_status") == "err":
        return "the last snapshot failed"
    return None


async def _refusal(client: Any) -> str | None:
    try:
        await client.set(PROBE_KEY, "", px=1_000)
        await client.delete(PROBE_KEY)
    except ResponseError as error:
        return f"it refuses writes: {error}"
    return None


async def _cache_refusal(url: str) -> str | None:
    """What it refuses of all that the service does with a cache."""
    cache = ValkeyCache(
        url=url,
        database_id="doctor",
        timeout_ms=int(TIMEOUT_S * 1000),
        lease_ms=1_000,
        nonce=lambda: secrets.token_bytes(12),
        clock=SystemClock(),
        metrics=Metrics(),
    )
    try:
        await cache.check()
    except CacheUnavailable as error:
        return str(error)
    finally:
        await cache.close()
    return None
