"""The faults of a deployment on several hosts, in addition to those of `tests.torture.faults` that need no more than a
cache, a queue and processes."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from random import Random

import psycopg
from redis.exceptions import RedisError, ResponseError

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.cluster import ClusterServers, address
from tests.support.servers import ask
from tests.support.waiting import eventually_sync
from tests.torture.faults import Skipped
from tests.torture.hosts import DATABASE, HostsDeployment, HostServer
from tests.torture.network import BOTH, DROP, IN, OUT, RESET, SUBNET

WHOLE_S = 30.0

HostFault = Callable[[HostsDeployment, Random], AbstractAsyncContextManager[None]]
HOST_FAULTS: dict[str, HostFault] = {}
CLUSTER_FAULTS: dict[str, HostFault] = {}


def fault(begins: Callable[[HostsDeployment, Random], AsyncIterator[None]]) -> HostFault:
    """Register a fault under the name of its function, as in `tests.torture.faults`."""
    made = asynccontextmanager(begins)
    HOST_FAULTS[begins.__name__] = made
    return made


def cluster_fault(begins: Callable[[HostsDeployment, Random], AsyncIterator[None]]) -> HostFault:
    """The same for a fault of a cluster."""
    made = asynccontextmanager(begins)
    CLUSTER_FAULTS[begins.__name__] = made
    return made


def _seconds(random: Random, usual: float, long: float) -> float:
    """At most `usual`, and `long` now and then, which is more than the timeouts of clients."""
    return long if random.random() < 0.1 else random.uniform(0.1, usual)


# The network.


@fault
async def host_partitioned(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A host and one of the servers do not reach each other, in both directions or in one."""
    host, server = random.choice(deployment.hosts), random.choice(deployment.servers)
    with host.apart(server, directions=random.choice([BOTH, [OUT], [IN]])):
        await asyncio.sleep(_seconds(random, 1.2, 4.5))
        yield


@fault
async def connections_reset(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The connections between a host and one of the servers are reset."""
    host, server = random.choice(deployment.hosts), random.choice(deployment.servers)
    with host.apart(server, directions=random.choice([BOTH, [OUT], [IN]]), target=RESET):
        await asyncio.sleep(random.uniform(0.05, 0.5))
        yield


@fault
async def packets_lost(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A host loses some of the packets that it receives from servers. TCP sends them again, later."""
    host = random.choice(deployment.hosts)
    some = ("-m", "statistic", "--mode", "random", "--probability", f"{random.uniform(0.02, 0.3):.2f}", *DROP)
    with host.apart(*deployment.servers, directions=[IN], target=some):
        await asyncio.sleep(random.uniform(0.2, 2.0))
        yield


@fault
async def standby_partitioned(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The primary does not reach its standby, so commits wait."""
    postgres = deployment.postgres
    with postgres.hosts[postgres.primary].apart(postgres.standby.host):
        await asyncio.sleep(_seconds(random, 1.0, 5.5))
        yield


# PostgreSQL.


@fault
async def postgres_restarted(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The primary is stopped or killed, and starts again."""
    async with deployment.postgres_lock:
        await asyncio.to_thread(deployment.postgres.restart, kill=random.random() < 0.7)
        yield


@fault
async def postgres_failed_over(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The primary dies, and the standby is promoted. Clients of the old primary notice at once, or its host does not
    answer any more."""
    async with deployment.postgres_lock:
        postgres = deployment.postgres
        old = postgres.hosts[postgres.primary]
        await asyncio.to_thread(postgres.wait_for_standby)
        with old.apart(*(SUBNET for _ in range(random.random() < 0.4))):
            await asyncio.to_thread(postgres.fail_over)
            await asyncio.sleep(random.uniform(0.0, 1.0))
        yield
        await asyncio.to_thread(postgres.replace_standby)


@fault
async def postgres_paused(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The processes of the primary are paused."""
    async with deployment.postgres_lock:
        primary = deployment.postgres.primary
        await asyncio.to_thread(primary.signal, signal.SIGSTOP)
        try:
            await asyncio.sleep(_seconds(random, 0.8, 4.5))
            yield
        finally:
            await asyncio.to_thread(primary.signal, signal.SIGCONT)


@fault
async def replay_paused(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The standby receives commits, but does not show them."""
    async with deployment.postgres_lock:
        execute = deployment.postgres.standby.execute
        await asyncio.to_thread(execute, "SELECT pg_wal_replay_pause()")
        try:
            await asyncio.sleep(random.uniform(0.2, 1.0))
            yield
        finally:
            await asyncio.to_thread(execute, "SELECT pg_wal_replay_resume()")


@fault
async def sessions_terminated(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """The primary ends some of its sessions, whatever they are doing, some times in a row."""
    for _ in range(random.randint(1, 4)):
        with suppress(psycopg.Error):
            await asyncio.to_thread(
                deployment.postgres.primary.execute,
                f"""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = '{DATABASE}' AND random() < {random.uniform(0.1, 0.9)}""",
            )
        await asyncio.sleep(random.uniform(0.02, 0.2))
    yield


@fault
async def users_locked(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """Another program locks the rows of all users; sometimes for longer than the timeout of writers."""
    seconds = _seconds(random, 1.0, 5.5)

    def hold() -> None:
        deployment.postgres.primary.execute(
            f"DO $$ BEGIN PERFORM 1 FROM users FOR UPDATE; PERFORM pg_sleep({seconds}); END $$", DATABASE
        )

    try:
        await asyncio.to_thread(hold)
    except psycopg.Error:
        raise Skipped from None
    yield


# The cluster. One fault at a time changes which node owns a slot, besides what the cluster decides itself.


@asynccontextmanager
async def _a_master(deployment: HostsDeployment, random: Random) -> AsyncIterator[tuple[ClusterServers, HostServer]]:
    """A master to change in the block. Afterwards all nodes run, and the cluster becomes whole again."""
    cluster = deployment.cluster
    assert cluster is not None
    async with deployment.cache_lock:
        master = random.choice(await asyncio.to_thread(cluster.masters))
        assert isinstance(master, HostServer)
        try:
            yield cluster, master
        finally:
            for node in cluster.servers:
                node.signal(signal.SIGCONT)
                if not node.running():
                    await asyncio.to_thread(node.start)
            await asyncio.to_thread(eventually_sync, lambda: _whole(cluster), WHOLE_S)


def _whole(cluster: ClusterServers) -> bool:
    try:
        return cluster.whole()
    except (RedisError, OSError):
        return False


@cluster_fault
async def master_failed_over(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A master dies, and its replica takes over without what the master did last. Then the master comes back, empty."""
    async with _a_master(deployment, random) as (cluster, master):
        replica = await asyncio.to_thread(cluster.lose_writes, master)
        await asyncio.sleep(random.uniform(0.05, 1.0))
        master.kill()
        await asyncio.to_thread(cluster.take_over, replica)
        await asyncio.sleep(random.uniform(0.0, 0.5))
        yield


@cluster_fault
async def master_restarted_old(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A master dies and starts with its contents of some time ago, before its replica takes over."""
    async with _a_master(deployment, random) as (_, master):
        await deployment.ask(master, "SAVE")
        dump = master.directory / "old.rdb"
        shutil.copyfile(master.directory / "dump.rdb", dump)
        await asyncio.sleep(random.uniform(0.1, 2.0))
        await deployment.restart(master, dump)
        yield


@cluster_fault
async def master_cut_off(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A master does not reach the other nodes, but hosts reach it. After a second, its replica takes over."""
    async with _a_master(deployment, random) as (cluster, master):
        others = [address(node)[0] for node in cluster.servers if node is not master]
        with master.host.apart(*others):
            await asyncio.sleep(random.uniform(0.5, 4.0))
            yield


@cluster_fault
async def master_paused_beyond_failover(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """A master is paused until its replica has taken over, and continues as if nothing had happened."""
    async with _a_master(deployment, random) as (_, master):
        master.signal(signal.SIGSTOP)
        await asyncio.sleep(random.uniform(1.5, 4.0))
        master.signal(signal.SIGCONT)
        yield


@cluster_fault
async def master_and_replica_changed(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """An operator lets a replica take over, which loses nothing, and back."""
    async with _a_master(deployment, random) as (cluster, master):
        replica = await asyncio.to_thread(cluster.replica_of, master)
        for node in (replica, master):
            with suppress(ResponseError):  # it is the master
                await asyncio.to_thread(ask, node, "CLUSTER", "FAILOVER", *random.choice([(), ("TAKEOVER",)]))
            await asyncio.sleep(random.uniform(0.1, 1.5))
        yield


@cluster_fault
async def slots_moved(deployment: HostsDeployment, random: Random) -> AsyncIterator[None]:
    """Slots with keys are moved to another master, and some of them back."""
    async with _a_master(deployment, random) as (cluster, master):
        others = [node for node in await asyncio.to_thread(cluster.masters) if node is not master]
        if not others:
            raise Skipped
        for _ in range(random.randint(1, 4)):
            key = await deployment.ask(master, "RANDOMKEY")
            if key is None:
                raise Skipped
            slot = int(await deployment.ask(master, "CLUSTER", "KEYSLOT", key))
            to = random.choice(others)
            await _move(cluster, slot, to, random)
            if random.random() < 0.5:
                await asyncio.sleep(random.uniform(0.0, 0.5))
                await _move(cluster, slot, master, random)
        yield


async def _move(cluster: ClusterServers, slot: int, to: EmbeddedServer, random: Random) -> None:
    source = await asyncio.to_thread(cluster.begin_move, slot, to)
    await asyncio.sleep(random.uniform(0.0, 0.5))

    def moved() -> bool:
        try:
            cluster.move_keys(slot, source, to)
            cluster.end_move(slot, source, to)
        except (RedisError, OSError):
            with suppress(RedisError, OSError):  # keys that cannot be moved would keep the slot here
                for key in ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 10_000):
                    ask(source, "DEL", key)
            return False
        return True

    with suppress(RedisError):
        await asyncio.to_thread(cluster.move_keys, slot, source, to, random.randint(1, 3))
    await asyncio.sleep(random.uniform(0.0, 0.5))
    await asyncio.to_thread(eventually_sync, moved, WHOLE_S)
