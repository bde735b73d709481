"""Diagnoses the cache and the queue for `profiles doctor`. The checks write test keys, and delete them."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import CacheUnavailable
from app.features.clock import SystemClock
from app.features.ids import HASH_SLOTS
from app.operations.doctor import Line, diagnose_clock
from app.settings import Settings
from app.stores.queue.client import HEALTH_SUFFIX, shown_databases
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.pool import AWAY, blocking_pool, is_cluster, public_reason, split_cluster_url
from app.stores.valkey.registration import ClusterNode, InMemoryState, ServerRegistration, parse_nodes
from app.telemetry import Metrics

TIMEOUT_S = 3.0
PROBE_KEY = "profiles:doctor"
LEAST_VERSION = (7, 0)
NO_EVICTION = "noeviction"
UNTIL_THEN = {
    "cache": "Until then every read is computed: correct, but slower.",
    "queue": "Until then events wait for a worker's sweep.",
}
Info = Mapping[str, Any]
Now = Callable[[], float]


async def diagnose_servers(settings: Settings) -> list[Line]:
    """Diagnose the cache, the queue and its workers. Return the lines of the report."""
    cache_lines, cache = await diagnose_server("cache", settings.cache_url)
    queue_lines, queue = await diagnose_server("queue", settings.queue_url, settings.queue_name)
    return [*cache_lines, *queue_lines, *_separate(cache, queue)]


async def diagnose_server(
    name: str, url: str | None, queue: str | None = None, now_s: Now = time.time
) -> tuple[list[Line], Info | None]:
    """Diagnose one server. Return the lines of the report, and the server's INFO; None if it does not answer. `name`:
    `cache` or `queue`. `queue`: the name of the queue; None for the cache. `now_s` reads this machine's clock."""
    setting = f"PROFILES_{name.upper()}_URL"
    if url is None:
        reason = f"{setting} is not set, and no `profiles up` runs here"
    else:
        try:
            if queue is not None:
                return await _queue(url, queue, now_s)
            return await (_cluster(url, now_s) if is_cluster(url) else _cache(url, now_s))
        except ValueError as error:
            reason = f"{setting}: {error}"
        except AWAY as error:
            reason = f"{public_reason(error)} ({type(error).__name__}: {error})"
    remedy = f"Start it, or correct {setting}. {UNTIL_THEN[name]}"
    return [Line(name, "bad", f"it cannot be diagnosed: {reason}", remedy)], None


def _client(url: str) -> Any:
    return Redis.from_pool(blocking_pool(url, TIMEOUT_S, 1, decode_responses=True))


async def _cache(url: str, now_s: Now) -> tuple[list[Line], Info]:
    (release, *lines), info = await _node(url, now_s)
    return [release, _writes("cache", info["role"], await _cache_refusal(url)), *lines], info


async def _queue(url: str, queue: str, now_s: Now) -> tuple[list[Line], Info]:
    async with _client(url) as client:
        info = await client.info()
        refusal = save = None
        try:
            await client.set(PROBE_KEY, "", px=1_000)
            await client.delete(PROBE_KEY)
        except ResponseError as error:
            refusal = f"it refuses writes: {error}"
        with suppress(ResponseError):  # many hosted servers forbid CONFIG
            save = (await client.config_get("save")).get("save")
        return [
            diagnose_release("queue", info),
            _writes("queue", info["role"], refusal),
            await _clock("queue", client, now_s),
            _queue_eviction(info),
            diagnose_persistence(info, None if save is None else bool(save)),
            await _worker(client, queue, now_s),
        ], info


async def _cluster(url: str, now_s: Now) -> tuple[list[Line], Info]:
    """Diagnose a cluster: its nodes as the first one that answers sees them, and each master that answers."""
    node_url, seeds = split_cluster_url(url)
    asked = await asyncio.gather(*(_nodes(node_url(seed)) for seed in seeds), return_exceptions=True)
    nodes = next((found for found in asked if isinstance(found, list)), asked[0])
    if isinstance(nodes, BaseException):
        raise nodes
    addresses = [node.address for node in nodes if node.address]
    reached = await asyncio.gather(*(_node(node_url(address), now_s) for address in addresses), return_exceptions=True)
    answers = {address: found for address, found in zip(addresses, reached, strict=True) if isinstance(found, tuple)}
    away = set(addresses) - answers.keys()
    masters = [node.address for node in nodes if node.ranges and node.address in answers]
    if not masters:
        return [diagnose_cluster(nodes, away)], {"run_id": ""}
    severity = ("ok", "warn", "bad")
    worst = [
        max(zip(masters, same, strict=True), key=lambda pair: severity.index(pair[1].state))
        for same in zip(*(answers[address][0] for address in masters), strict=True)
    ]
    shown = [line if line.state == "ok" else line._replace(text=f"{address}: {line.text}") for address, line in worst]
    writes = _writes("cache", "master", await _cache_refusal(url))
    return [shown[0], diagnose_cluster(nodes, away), writes, *shown[1:]], answers[masters[0]][1]


def diagnose_cluster(nodes: Sequence[ClusterNode], away: Collection[str]) -> Line:
    """Report whether all slots are covered and each master has a replica. `away`: the addresses that do not answer."""
    failed = [node for node in nodes if node.address in {*away, ""} or "fail" in node.flags]
    silent = f"these nodes do not answer: {', '.join(node.address or node.node for node in failed)}"
    masters = [node for node in nodes if node.ranges]
    covered = sum(last + 1 - first for node in masters if node not in failed for first, last in node.ranges)
    if covered < HASH_SLOTS:
        text = f"{HASH_SLOTS - covered} of {HASH_SLOTS} slots are not covered by a master that answers"
        remedy = "Start the missing nodes, or assign their slots (CLUSTER ADDSLOTS). Reads of their users are computed."
        return Line("cache cluster", "bad", f"{text}; {silent}" if failed else text, remedy)
    if failed:
        remedy = (
            "Start them, or remove them (CLUSTER FORGET). This machine must reach the addresses that they announce."
        )
        return Line("cache cluster", "warn", silent, remedy)
    copied = {node.master for node in nodes}
    if alone := [node.address for node in masters if node.node not in copied]:
        text = f"these masters have no replica: {', '.join(alone)}"
        return Line("cache cluster", "warn", text, "Add one to each (CLUSTER REPLICATE), so that its slots survive it.")
    return Line("cache cluster", "ok", f"{len(masters)} masters cover all slots, and each has a replica")


async def _nodes(url: str) -> list[ClusterNode]:
    async with _client(url) as client:
        client.response_callbacks.pop("CLUSTER NODES")  # redis-py keeps no config epochs
        return parse_nodes(await client.execute_command("CLUSTER NODES"))


async def _node(url: str, now_s: Now) -> tuple[list[Line], Info]:
    async with _client(url) as client:
        info: Info = await client.info()
        return [diagnose_release("cache", info), await _clock("cache", client, now_s), _cache_memory(info)], info


def diagnose_release(name: str, info: Info) -> Line:
    valkey = info.get("valkey_version")
    version = str(valkey or info["redis_version"])
    shown = f"{'Valkey' if valkey else 'Redis'} {version}"
    if tuple(int(part) for part in version.split(".") if part.isdigit()) < LEAST_VERSION:
        return Line(name, "bad", f"{shown} is too old", "Run Redis or Valkey 7.0 or later.")
    return Line(name, "ok", f"{shown} answers")


def _writes(name: str, role: str, refusal: str | None) -> Line:
    if role != "master":
        remedy = f"Point PROFILES_{name.upper()}_URL at the master, or at the Sentinels (?sentinel=NAME)."
        text = f"it is a {'replica' if role == 'slave' else role}, which takes no writes"
        return Line(f"{name} writes", "bad", text, remedy)
    if refusal is not None:
        remedy = "Check its log, its disk, its memory limit and the permissions of the user in the URL."
        return Line(f"{name} writes", "bad", refusal, remedy)
    return Line(f"{name} writes", "ok", "it takes writes")


async def _cache_refusal(url: str) -> str | None:
    """Try the commands of the cache. Return the reason if the server refuses one, otherwise None."""
    state, clock = InMemoryState("doctor"), SystemClock()
    cache = ValkeyCache(
        url=url,
        registration=ServerRegistration(state, state.store, clock),
        timeout_ms=int(TIMEOUT_S * 1000),
        lease_ms=1_000,
        clock=clock,
        metrics=Metrics(),
    )
    try:
        await cache.check()
    except CacheUnavailable as error:
        return str(error)
    finally:
        await cache.close()
    return None


async def _clock(name: str, client: Any, now_s: Now) -> Line:
    before_s = now_s()
    seconds, microseconds = await client.time()
    after_s = now_s()
    return diagnose_clock(name, before_s, seconds + microseconds / 1e6, after_s)


def _memory(info: Info) -> tuple[int, str]:
    """The memory limit in bytes, 0 if there is none, and the eviction policy."""
    return int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", NO_EVICTION))


def _cache_memory(info: Info) -> Line:
    limit, policy = _memory(info)
    if not limit:
        remedy = "Set maxmemory, and maxmemory-policy allkeys-lru or allkeys-lfu."
        return Line("cache memory", "warn", "it has no memory limit and grows with the number of users", remedy)
    shown = f"{limit / 2**20:,.0f} MiB, {policy}"
    if policy == NO_EVICTION:
        remedy = "Set maxmemory-policy allkeys-lru or allkeys-lfu."
        return Line("cache memory", "warn", f"{shown}: once full, it stores no new values", remedy)
    return Line("cache memory", "ok", f"limited to {shown}")


def _queue_eviction(info: Info) -> Line:
    limit, policy = _memory(info)
    if policy == NO_EVICTION:
        return Line("queue eviction", "ok", "it never evicts")
    text = f"it may evict jobs ({policy})" if limit else f"with a memory limit it would evict jobs ({policy})"
    remedy = "Set maxmemory-policy noeviction on the queue's server."
    return Line("queue eviction", "bad" if limit else "warn", text, remedy)


def diagnose_persistence(info: Info, snapshots: bool | None) -> Line:
    """Report whether a restart of the queue loses jobs. `snapshots`: whether it takes snapshots; None if unknown."""
    appends = info.get("aof_enabled")
    unappended = appends and info.get("aof_last_write_status") == "err"
    if unappended or info.get("rdb_last_bgsave_status") == "err":
        failed = "write of the append-only file" if unappended else "snapshot"
        text = f"it cannot store its jobs on disk: the last {failed} failed"
        return Line("queue persistence", "bad", text, "Check its disk and its log.")
    if appends:
        return Line("queue persistence", "ok", "it writes an append-only file")
    remedy = "Set appendonly yes. Jobs that producers publish on the queue may be lost; events sent over HTTP are safe."
    if snapshots is None:
        return Line("queue persistence", "warn", "it writes no append-only file, and snapshots are unknown", remedy)
    writes = "it writes only snapshots" if snapshots else "it writes nothing to disk"
    return Line("queue persistence", "warn", f"{writes}: a restart loses jobs that no worker has taken", remedy)


async def _worker(client: Any, queue: str, now_s: Now) -> Line:
    databases = await shown_databases(client, queue, int(now_s() * 1000))
    if len(databases) > 1:
        text = f"workers of {len(databases)} databases take each other's jobs from this queue"
        return Line("worker", "bad", text, "Set a different PROFILES_QUEUE_NAME for each service.")
    if await client.exists(queue + HEALTH_SUFFIX):
        return Line("worker", "ok", "a worker has reported within the last seconds")
    remedy = "Start `profiles worker`. Until then events wait to be consumed; reads are not affected."
    return Line("worker", "bad", "no worker has reported within the last seconds", remedy)


def _separate(cache: Info | None, queue: Info | None) -> list[Line]:
    if cache is None or queue is None:
        return []
    if cache["run_id"] != queue["run_id"]:
        return [Line("separate", "ok", "cache and queue are two servers")]
    remedy = "Use a separate server for the queue: a cache must evict, a queue must not."
    limit, policy = _memory(cache)
    if limit and policy != NO_EVICTION:
        return [Line("separate", "bad", f"cache and queue share a server that evicts ({policy})", remedy)]
    return [Line("separate", "warn", "cache and queue share a server; flushing the cache would flush both", remedy)]
