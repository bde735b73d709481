"""The faults. Each begins, lasts a while and ends; one that cannot begin (its server is down) is skipped.

Faults of different parts overlap freely. Those that stop or kill one process, or restart the cache server, are
serialised by a lock, because a process cannot be killed twice at once. A paused server may be killed.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from pathlib import Path
from random import Random

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.database import used_bytes
from tests.torture.deployment import LEASE_MS, TIMEOUT_MS, Deployment, ProcessSlot
from tests.torture.model import MAX_STEP_MS

STEPS_MS = (3_000, 3_600_000, MAX_STEP_MS)


class Skipped(Exception):
    """The fault cannot begin."""


Fault = Callable[[Deployment, Random], AbstractAsyncContextManager[None]]
FAULTS: dict[str, Fault] = {}
# Those that need the proxy, or the file of SQLite.
ON_ONE_HOST = {"connection_cut", "replies_delayed", "partition", "database_locked", "disk_full"}
ON_ONE_CACHE = {"restart_old"}


def fault(begins: Callable[[Deployment, Random], AsyncIterator[None]]) -> Fault:
    """Register a fault under the name of its function. The fault begins before its `yield` and ends after it."""
    made = asynccontextmanager(begins)
    FAULTS[begins.__name__] = made
    return made


# The contents of the cache.


@fault
async def flushall(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """All keys are deleted, leases too."""
    await deployment.ask(deployment.a_cache(random), "FLUSHALL")
    yield


@fault
async def del_keys(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Random keys are deleted."""
    cache = deployment.a_cache(random)
    for _ in range(random.randint(5, 40)):
        key = await deployment.ask(cache, "RANDOMKEY")
        if key is not None:
            await deployment.ask(cache, "DEL", key)
    yield


@fault
async def restart_empty(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The cache is killed and starts empty."""
    async with deployment.cache_lock:
        await deployment.restart(deployment.a_cache(random))
        yield


@fault
async def restart_old(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The cache is killed and starts with its contents of some seconds ago: old values and leases reappear."""
    async with deployment.cache_lock:
        if not deployment.dumps:
            raise Skipped
        await deployment.restart(deployment.cache, random.choice(deployment.dumps[-4:]))
        yield


@fault
async def out_of_memory(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The cache is full and does not evict: it rejects leases and fills, but deletes."""
    async with _configured(deployment, deployment.a_cache(random), maxmemory="1mb", policy="noeviction"):
        await asyncio.sleep(random.uniform(0.2, 1.0))
        yield


@fault
async def evicting(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The cache is full and evicts random keys, leases too."""
    async with _configured(deployment, deployment.a_cache(random), maxmemory="1mb", policy="allkeys-random"):
        await asyncio.sleep(random.uniform(0.2, 1.0))
        yield


@asynccontextmanager
async def _configured(
    deployment: Deployment, cache: EmbeddedServer, *, maxmemory: str, policy: str
) -> AsyncIterator[None]:
    await deployment.ask(cache, "CONFIG", "SET", "maxmemory", maxmemory, "maxmemory-policy", policy)
    try:
        yield
    finally:
        with suppress(Exception):  # a restarted server has its original configuration
            await deployment.ask(cache, "CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")


# Pauses of the cache.


async def _paused(cache: EmbeddedServer, seconds: float) -> None:
    cache.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        cache.signal(signal.SIGCONT)


@fault
async def cache_paused_briefly(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The cache is paused for less than the timeout of a command."""
    await _paused(deployment.a_cache(random), random.uniform(0.01, 0.8 * TIMEOUT_MS / 1000))
    yield


@fault
async def cache_paused_beyond_timeouts(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Commands time out, but the cache executes them after the pause; leases have not expired."""
    await _paused(deployment.a_cache(random), random.uniform(1.2 * TIMEOUT_MS / 1000, 0.9 * LEASE_MS / 1000))
    yield


@fault
async def cache_paused_beyond_leases(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Commands time out, and leases have expired when the cache continues."""
    await _paused(deployment.a_cache(random), random.uniform(1.2 * LEASE_MS / 1000, 3 * LEASE_MS / 1000))
    yield


# The connection of every second process to the cache.


@fault
async def connection_cut(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Connections are cut in the middle of a command or a reply, some times in a row."""
    for _ in range(random.randint(1, 4)):
        deployment.proxy.cut_pieces = 1
        await asyncio.sleep(random.uniform(0.02, 0.2))
    deployment.proxy.cut_pieces = 0
    yield


@fault
async def replies_delayed(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Commands and replies are delayed, by less or more than the timeout."""
    deployment.proxy.delay_s = random.choice([0.01, 0.03, 0.06, 0.15])
    try:
        await asyncio.sleep(random.uniform(0.2, 1.0))
        yield
    finally:
        deployment.proxy.delay_s = 0.0


@fault
async def partition(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The network is partitioned: bytes wait until the partition ends, or connections are refused."""
    (deployment.proxy.silence if random.random() < 0.6 else deployment.proxy.cut)()
    try:
        await asyncio.sleep(random.uniform(0.15, 1.2))
        yield
    finally:
        deployment.proxy.mend()


# The queue.


@fault
async def queue_lost(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The queue is killed and starts empty."""
    async with deployment.queue_lock:
        await deployment.restart(deployment.queue)
        yield


@fault
async def queue_paused(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The queue is paused, for less or more than the timeout of a worker."""
    deployment.queue.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(random.uniform(0.1, 3.0))
        yield
    finally:
        deployment.queue.signal(signal.SIGCONT)


# Processes.


@asynccontextmanager
async def _killed(deployment: Deployment, slot: ProcessSlot) -> AsyncIterator[None]:
    async with slot.lock:
        if not slot.up:
            raise Skipped
        await deployment.kill(slot)
        try:
            yield
        finally:
            await deployment.start(slot)


@fault
async def api_killed(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """An API process is killed with SIGKILL and started again."""
    free = [slot for slot in deployment.apis if slot.up and not slot.lock.locked()]
    if not free:
        raise Skipped
    async with _killed(deployment, random.choice(free)):
        yield


@fault
async def worker_killed(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """The worker is killed with SIGKILL and started again."""
    async with _killed(deployment, deployment.workers[0]):
        yield


@fault
async def second_worker(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """A second worker runs for a while."""
    slot = deployment.workers[1]
    async with slot.lock:
        await deployment.start(slot)
        await asyncio.sleep(random.uniform(0.5, 2.0))
        yield
        await deployment.stop(slot)


@fault
async def process_paused(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """An API process or the worker is paused between two steps and then continues."""
    slot: ProcessSlot = random.choice([*deployment.apis, deployment.workers[0]])
    async with slot.lock:
        program = slot.program
        if not slot.up or program is None:
            raise Skipped
        program.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(random.uniform(0.05, 0.8))
            yield
        finally:
            program.send(signal.SIGCONT)


# The database and the clock.


@fault
async def database_locked(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Another program holds the write lock; sometimes for longer than the timeout of writers."""
    seconds = random.uniform(5.2, 6.5) if random.random() < 0.06 else random.uniform(0.1, 1.0)
    held, over = threading.Event(), threading.Event()

    def hold() -> bool:
        connection = sqlite3.connect(deployment.database, timeout=2, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            held.set()
            over.wait(60)
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()
        return True

    holding = asyncio.create_task(asyncio.to_thread(hold))
    try:
        await asyncio.sleep(seconds)
    finally:
        over.set()
    if not await holding:
        raise Skipped
    yield


@fault
async def disk_full(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """No file can grow: by a limit set on the running processes, or because another file fills `deployment.disk`."""
    seconds = random.uniform(0.2, 1.0)
    wal = deployment.database.with_name(deployment.database.name + "-wal")
    if deployment.disk is not None:
        filler = deployment.disk / "filler"
        try:
            await asyncio.to_thread(_fill, filler, deployment.database, wal)
            await asyncio.sleep(seconds)
            yield
        finally:
            filler.unlink(missing_ok=True)
        return
    if sys.platform != "linux":  # only Linux can limit a running process
        raise Skipped
    limit = max(256 * 1024, used_bytes(wal) if wal.exists() else 0)
    limited = list(deployment.pids().values())
    for pid in limited:
        _limit(pid, limit)
    try:
        await asyncio.sleep(seconds)
        yield
    finally:
        for pid in limited:
            _limit(pid, resource.RLIM_INFINITY)


def _fill(filler: Path, database: Path, wal: Path) -> None:
    with closing(sqlite3.connect(database, timeout=2, isolation_level=None)) as connection, filler.open("wb") as file:
        try:
            connection.execute("BEGIN IMMEDIATE")  # no process adds a frame meanwhile
        except sqlite3.OperationalError:
            raise Skipped from None
        os.truncate(wal, used_bytes(wal))  # the WAL has no room left, either
        piece = shutil.disk_usage(filler).free
        while piece >= 4_096:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)
            except OSError:
                piece //= 2


def _limit(pid: int, size: int) -> None:
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


async def _stepped(deployment: Deployment, random: Random, direction: int) -> AsyncIterator[None]:
    slots = [*deployment.apis, *deployment.workers]
    clocks = [slot.clock for slot in (slots if random.random() < 0.4 else random.sample(slots, random.randint(1, 2)))]
    ns = direction * int(random.uniform(0.1, 1) * random.choice(STEPS_MS)) * 1_000_000
    for clock in clocks:
        clock.step(ns)
    try:
        await asyncio.sleep(random.uniform(0.2, 2.0))
        yield
    finally:
        for clock in clocks:
            clock.step(0)


@fault
async def clock_forward(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Some or all wall clocks step forward by up to seconds, minutes or days, and back."""
    async for _ in _stepped(deployment, random, +1):
        yield


@fault
async def clock_back(deployment: Deployment, random: Random) -> AsyncIterator[None]:
    """Some or all wall clocks step back by up to seconds, minutes or days, and forward."""
    async for _ in _stepped(deployment, random, -1):
        yield
