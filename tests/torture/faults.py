"""The faults: each begins, lasts a while and ends. What cannot begin (its server is down just now) does not count.

Faults about different things overlap freely. Those about one process, or about whether the cache's server runs, take
turns, because a server cannot be killed twice at once; a paused one may be killed, and a killed one's data may rise.
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
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from random import Random

from tests.torture.launcher import set_clock
from tests.torture.site import LEASE_MS, TIMEOUT_MS, Site, Slot


class Missed(Exception):
    """The fault found nothing to befall."""


Fault = Callable[[Site, Random], AbstractAsyncContextManager[None]]
FAULTS: dict[str, Fault] = {}


def fault(begins: Callable[[Site, Random], AsyncIterator[None]]) -> Fault:
    """Registers a fault under the name of its function: up to `yield` it begins, after that it ends."""
    made = asynccontextmanager(begins)
    FAULTS[begins.__name__] = made
    return made


async def _wait(seconds: float) -> None:
    await asyncio.sleep(seconds)


# The cache's contents.


@fault
async def flushall(site: Site, random: Random) -> AsyncIterator[None]:
    """Every key goes, leases too."""
    await site.ask(site.cache, "FLUSHALL")
    yield


@fault
async def del_keys(site: Site, random: Random) -> AsyncIterator[None]:
    """Random keys go."""
    for _ in range(random.randint(5, 40)):
        key = await site.ask(site.cache, "RANDOMKEY")
        if key is not None:
            await site.ask(site.cache, "DEL", key)
    yield


@fault
async def restart_empty(site: Site, random: Random) -> AsyncIterator[None]:
    """The cache dies, and comes back with nothing."""
    async with site.cache_turn:
        await site.restart(site.cache)
        yield


@fault
async def restart_old(site: Site, random: Random) -> AsyncIterator[None]:
    """The cache dies, and comes back with what it held some seconds ago: values and leases rise from the dead."""
    async with site.cache_turn:
        if not site.dumps:
            raise Missed
        await site.restart(site.cache, random.choice(site.dumps[-4:]))
        yield


@fault
async def out_of_memory(site: Site, random: Random) -> AsyncIterator[None]:
    """The cache is full and does not evict: it refuses leases and fills, and deletes."""
    async with _configured(site, maxmemory="1mb", policy="noeviction"):
        await _wait(random.uniform(0.2, 1.0))
        yield


@fault
async def evicting(site: Site, random: Random) -> AsyncIterator[None]:
    """The cache is full and evicts whatever it likes, leases too."""
    async with _configured(site, maxmemory="1mb", policy="allkeys-random"):
        await _wait(random.uniform(0.2, 1.0))
        yield


@asynccontextmanager
async def _configured(site: Site, *, maxmemory: str, policy: str) -> AsyncIterator[None]:
    await site.ask(site.cache, "CONFIG", "SET", "maxmemory", maxmemory, "maxmemory-policy", policy)
    try:
        yield
    finally:
        with suppress(Exception):  # a new server has its own configuration
            await site.ask(site.cache, "CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")


# The cache's silence.


async def _paused(site: Site, seconds: float) -> None:
    site.cache.signal(signal.SIGSTOP)
    try:
        await _wait(seconds)
    finally:
        site.cache.signal(signal.SIGCONT)


@fault
async def cache_paused_briefly(site: Site, random: Random) -> AsyncIterator[None]:
    """For less than a command may take."""
    await _paused(site, random.uniform(0.01, 0.8 * TIMEOUT_MS / 1000))
    yield


@fault
async def cache_paused_beyond_timeouts(site: Site, random: Random) -> AsyncIterator[None]:
    """Commands time out, but lie in its socket, and it will carry them out; leases live on."""
    await _paused(site, random.uniform(1.2 * TIMEOUT_MS / 1000, 0.9 * LEASE_MS / 1000))
    yield


@fault
async def cache_paused_beyond_leases(site: Site, random: Random) -> AsyncIterator[None]:
    """The same, and leases are over when it goes on."""
    await _paused(site, random.uniform(1.2 * LEASE_MS / 1000, 3 * LEASE_MS / 1000))
    yield


# One process's way to the cache; the others reach it.


@fault
async def connection_cut(site: Site, random: Random) -> AsyncIterator[None]:
    """In the middle of a command or of a reply, some times in a row."""
    for _ in range(random.randint(1, 4)):
        site.way.cut_pieces = 1
        await _wait(random.uniform(0.02, 0.2))
    site.way.cut_pieces = 0
    yield


@fault
async def replies_delayed(site: Site, random: Random) -> AsyncIterator[None]:
    """By less than a timeout, or by more."""
    site.way.delay_s = random.choice([0.01, 0.03, 0.06, 0.15])
    try:
        await _wait(random.uniform(0.2, 1.0))
        yield
    finally:
        site.way.delay_s = 0.0


@fault
async def partition(site: Site, random: Random) -> AsyncIterator[None]:
    """Bytes wait on the way, and arrive when it is over; or it is cut."""
    (site.way.silence if random.random() < 0.6 else site.way.cut)()
    try:
        await _wait(random.uniform(0.15, 1.2))
        yield
    finally:
        site.way.mend()


# The queue.


@fault
async def queue_lost(site: Site, random: Random) -> AsyncIterator[None]:
    """With everything on it."""
    async with site.queue_turn:
        await site.restart(site.queue)
        yield


@fault
async def queue_paused(site: Site, random: Random) -> AsyncIterator[None]:
    """For less, or more, than a worker waits."""
    site.queue.signal(signal.SIGSTOP)
    try:
        await _wait(random.uniform(0.1, 3.0))
        yield
    finally:
        site.queue.signal(signal.SIGCONT)


# Processes.


@asynccontextmanager
async def _killed(site: Site, slot: Slot) -> AsyncIterator[None]:
    async with slot.turn:
        if not slot.up:
            raise Missed
        await site.kill(slot)
        try:
            yield
        finally:
            await site.start(slot)


@fault
async def api_killed(site: Site, random: Random) -> AsyncIterator[None]:
    """With -9, and started again."""
    async with _killed(site, random.choice(site.apis)):
        yield


@fault
async def worker_killed(site: Site, random: Random) -> AsyncIterator[None]:
    """With -9, and started again."""
    async with _killed(site, site.workers[0]):
        yield


@fault
async def second_worker(site: Site, random: Random) -> AsyncIterator[None]:
    """A worker runs twice for a while."""
    slot = site.workers[1]
    async with slot.turn:
        await site.start(slot)
        await _wait(random.uniform(0.5, 2.0))
        yield
        await site.stop(slot)


@fault
async def process_paused(site: Site, random: Random) -> AsyncIterator[None]:
    """An API process or the worker stands still between two of its steps, and goes on as if nothing had been."""
    slot: Slot = random.choice([*site.apis, site.workers[0]])
    async with slot.turn:
        program = slot.program
        if not slot.up or program is None:
            raise Missed
        program.send(signal.SIGSTOP)
        try:
            await _wait(random.uniform(0.05, 0.8))
            yield
        finally:
            program.send(signal.SIGCONT)


@fault
async def beside_killed(site: Site, random: Random) -> AsyncIterator[None]:
    """The process beside an API process stands still for a while, and dies with -9."""
    slot = random.choice(site.apis)
    async with slot.turn:
        program = slot.program
        shadow = "app.bandit.shadow.subprocess"
        if not slot.up or program is None or not (pid := await asyncio.to_thread(program.child, shadow)):
            raise Missed
        _signal(pid, signal.SIGSTOP)
        await _wait(random.uniform(0.0, 0.5))
        yield
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# The database and the clock.


@fault
async def database_locked(site: Site, random: Random) -> AsyncIterator[None]:
    """Another program holds the write lock; now and then longer than a writer waits for it."""
    seconds = random.uniform(5.2, 6.5) if random.random() < 0.06 else random.uniform(0.1, 1.0)
    held, over = threading.Event(), threading.Event()

    def hold() -> bool:
        connection = sqlite3.connect(site.database, timeout=2, isolation_level=None)
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
        await _wait(seconds)
    finally:
        over.set()
    if not await holding:
        raise Missed
    yield


@fault
async def disk_full(site: Site, random: Random) -> AsyncIterator[None]:
    """No file grows any more: by a limit set on the running processes, or by a file that fills a disk of its own."""
    seconds = random.uniform(0.2, 1.0)
    if site.disk is not None:
        balloon = site.disk / "balloon"
        try:
            await asyncio.to_thread(_blow_up, balloon, shutil.disk_usage(site.disk).free)
            await _wait(seconds)
            yield
        finally:
            balloon.unlink(missing_ok=True)
        return
    if sys.platform != "linux":  # nobody else can limit a process that runs
        raise Missed
    wal = site.database.with_name(site.database.name + "-wal")
    limit = max(256 * 1024, wal.stat().st_size if wal.exists() else 0)
    limited = site.pids()
    for pid in limited:
        _limit(pid, limit)
    try:
        await _wait(seconds)
        yield
    finally:
        for pid in limited:
            _limit(pid, resource.RLIM_INFINITY)


def _blow_up(balloon: Path, free: int) -> None:
    with balloon.open("wb") as file:
        piece = free
        while piece >= 4_096:  # until nothing is left
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)
            except OSError:
                piece //= 2


def _limit(pid: int, size: int) -> None:
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


async def _stepped(site: Site, seconds: float, lasting_s: float) -> AsyncIterator[None]:
    set_clock(site.clock, int(seconds * 1e9))
    try:
        await _wait(lasting_s)
        yield
    finally:
        set_clock(site.clock, 0)


@fault
async def clock_forward(site: Site, random: Random) -> AsyncIterator[None]:
    """By up to an hour, and back."""
    async for _ in _stepped(site, random.uniform(1, 3600), random.uniform(0.2, 2.0)):
        yield


@fault
async def clock_back(site: Site, random: Random) -> AsyncIterator[None]:
    """By up to an hour, and forward."""
    async for _ in _stepped(site, -random.uniform(1, 3600), random.uniform(0.2, 2.0)):
        yield
