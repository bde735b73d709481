"""A cluster of three masters and three replicas as the cache: no read is stale, and a fault affects only its shard."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import lru_cache

import pytest

from app.bootstrap.service import OpenService, open_service
from app.errors import CacheUnavailable
from app.features.ids import hash_slot
from app.profiles.ports import Cell, Epoch, Fill
from app.settings import Settings
from app.stores.valkey import cluster as cluster_module
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.registration import Owners, owners
from tests.integration.stores.valkey.conftest import OpenCache
from tests.support.cluster import ClusterServers
from tests.support.events import served
from tests.support.processes import free_port
from tests.support.proxy import proxy
from tests.support.registry import FEATURES
from tests.support.servers import VALKEY, StartServer
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

VOLUME = 4
both_engines = pytest.mark.parametrize("engine", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])


class Shards:
    """Two processes on a cluster, and for each of its first masters the id of a user with keys there."""

    def __init__(self, services: Sequence[OpenService], cluster: ClusterServers) -> None:
        self.services = services
        self.cluster = cluster
        self.masters = cluster.masters()
        slots = [cluster.slots(master) for master in self.masters]
        self.users = [next(user for user in map(str, range(1_000)) if hash_slot(user) in own) for own in slots]
        self.sent = dict.fromkeys(self.users, 0)

    async def send(self, user_id: str, service: int = 0) -> bool:
        """Ingest an event of the user. Return whether the keys were deleted."""
        self.sent[user_id] += 1
        at_ms = self.services[service].clock.now_ms() - 1_000
        event = served(user_id, at_ms, event_id=f"e{self.sent[user_id]}")
        return (await self.services[service].ingestor.ingest([event])).invalidated

    async def read(self, *user_ids: str, services: Sequence[int] = (0, 1)) -> list[bool]:
        """Assert that every process has the right values. Return whether each user's value was a hit in all."""
        hits = [True] * len(user_ids)
        for service in (self.services[index] for index in services):
            found = await service.reader.read(dict.fromkeys(user_ids, 1 << VOLUME))
            for place, user_id in enumerate(user_ids):
                value = found[user_id][VOLUME]
                assert int(value.json) == self.sent[user_id], f"a read of {user_id} is stale"
                hits[place] &= value.cached
        return hits

    def silent(self) -> list[float | None]:
        """For each process, how often it waited in vain for a server."""
        name, labels = "profiles_cache_errors_total", {"kind": "silent"}
        return [service.metrics.collectors.get_sample_value(name, labels) for service in self.services]

    async def until_hits(self, *user_ids: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not all(await self.read(*user_ids)):
                pass


@pytest.fixture
def engine() -> str:
    return "sqlite"


@pytest.fixture
def timeout_ms() -> int:
    """A server that is killed refuses connections at once. Only tests that pause a server wait until its timeout."""
    return 5_000


@pytest.fixture
async def shards(
    request: pytest.FixtureRequest, engine: str, timeout_ms: int, cluster: ClusterServers
) -> AsyncIterator[Shards]:
    database = request.getfixturevalue("postgres_url" if engine == "postgres" else "database_path")
    settings = Settings(
        features=FEATURES, database=database, cache_url=cluster.url, cache_timeout_ms=timeout_ms, near_users=0
    )
    async with open_service(settings, door="http") as first, open_service(settings, door="http") as second:
        opened = Shards([first, second], cluster)
        for user_id in opened.users:
            await opened.send(user_id)
        await opened.until_hits(*opened.users)
        yield opened


@lru_cache
def one_generation(epoch: Epoch) -> Owners:
    """A mutant: the keys of all slots begin with the number of registrations."""
    found = owners(epoch)
    newest = str(sum(owner.generation for owner in set(found) if owner))
    made = {owner: owner and replace(owner, epoch=newest) for owner in set(found)}
    return [made[owner] for owner in found]


@lru_cache
def no_generation(epoch: Epoch) -> Owners:
    """A mutant: the keys of all slots always begin with the same epoch."""
    made = {owner: owner and replace(owner, epoch="forever") for owner in set(owners(epoch))}
    return [made[owner] for owner in owners(epoch)]


async def failover_with_lost_deletions(shards: Shards) -> None:
    user, *others = shards.users
    replica = shards.cluster.lose_writes(shards.masters[0])
    assert await shards.send(user), "the master has confirmed the deletion"
    shards.masters[0].kill()
    shards.cluster.take_over(replica)
    hits = []
    async with asyncio.timeout(PATIENCE_S):
        while not all(await shards.read(user)):
            hits += await shards.read(*others)
    hits += await shards.read(*others)
    assert all(hits), "the hits of other shards were lost"
    assert await shards.send(user)
    await shards.until_hits(*shards.users)


@both_engines
async def test_failover_with_lost_deletions_affects_only_its_shard(shards: Shards) -> None:
    await failover_with_lost_deletions(shards)


@pytest.mark.parametrize(("mutant", "violation"), [(one_generation, "hits of other"), (no_generation, "is stale")])
async def test_failover_finds_mutants(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[Epoch], Owners], violation: str
) -> None:
    monkeypatch.setattr(cluster_module, "owners", mutant)
    await shards.until_hits(*shards.users)
    with pytest.raises(AssertionError, match=violation):
        await failover_with_lost_deletions(shards)


async def demote_and_promote(shards: Shards) -> None:
    """A master becomes a replica, loses a deletion and becomes the master again. No process notices, since none of this
    leaves the event loop."""
    user, master = shards.users[0], shards.masters[0]
    replica = shards.cluster.lose_writes(master)
    assert await shards.send(user)
    master.signal(signal.SIGSTOP)  # so that it sends nothing to the replica
    shards.cluster.take_over(replica)
    master.signal(signal.SIGCONT)
    shards.cluster.until_replica(master)
    shards.cluster.take_over(master)
    await shards.until_hits(user)


async def test_read_is_right_when_a_master_was_a_replica_meanwhile(shards: Shards) -> None:
    await demote_and_promote(shards)


async def test_read_is_stale_when_the_replication_id_is_ignored(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "_is_same_master", lambda *_: True)
    with pytest.raises(AssertionError, match="is stale"):
        await demote_and_promote(shards)


async def test_rebuild_computes_once_when_a_master_is_dead(shards: Shards) -> None:
    user, *others = shards.users
    shards.masters[0].kill()
    assert not await shards.send(user)
    service = shards.services[0]

    def computed_users() -> float:
        return service.metrics.collectors.get_sample_value("profiles_computed_users_total") or 0

    before = computed_users()
    rebuilt = await service.rebuilder.rebuild(shards.users, 1 << VOLUME)
    assert computed_users() - before == len(shards.users)
    assert {user_id for user_id in shards.users if rebuilt[user_id][VOLUME].expires_at_ms is None} == {user}
    assert int(rebuilt[user][VOLUME].json) == shards.sent[user]
    assert await shards.read(*others, services=[0]) == [True, True]


async def test_read_succeeds_when_all_wanted_features_are_disabled(shards: Shards) -> None:
    service = shards.services[0]
    await service.registries.switch(service.registry.names[VOLUME], "ada", "", service.clock.now_ms(), on=False)
    wanted = dict.fromkeys(shards.users, 1 << VOLUME)
    for profile in (await service.reader.read(wanted)).values():
        assert profile[VOLUME].json == b"null"
    assert await service.reader.read_shared_values(wanted) == {user: [b"null"] for user in shards.users}
    rebuilt = await service.rebuilder.rebuild(shards.users, 1 << VOLUME)
    assert {profile[VOLUME].json for profile in rebuilt.values()} == {b"null"}
    (inspection, *_) = await service.inspector.inspect(shards.users)
    assert inspection.cells[VOLUME].disabled


@pytest.mark.parametrize("timeout_ms", [1_000])
async def test_paused_master_affects_only_its_shard(shards: Shards) -> None:
    user, *others = shards.users
    shards.masters[0].signal(signal.SIGSTOP)
    assert await shards.read(user) == [False]
    for service in shards.services:
        assert service.cache.available
    assert not await shards.send(user)
    assert await shards.send(others[0])
    await shards.until_hits(*others)
    silent = shards.silent()
    for _ in range(10):
        assert await shards.read(user, *others) == [False, True, True]
    assert shards.silent() == silent, "no read waits for a master that did not answer before"
    shards.masters[0].signal(signal.SIGCONT)
    await shards.until_hits(*shards.users)


@both_engines
async def test_lost_shard_affects_only_its_users(shards: Shards) -> None:
    user, *others = shards.users
    lost = (shards.cluster.replica_of(shards.masters[0]), shards.masters[0])
    for server in lost:
        server.kill()
    assert await shards.read(user) == [False]
    assert not await shards.send(user)
    for service in shards.services:
        await service.invalidator.owed.owe(others, 1)  # as if their deletions had failed before
        with pytest.raises(CacheUnavailable):
            await service.invalidator.settle()
        assert (await service.database.state.query()).owed == {hash_slot(user)}
    await shards.until_hits(*others)
    assert await shards.send(others[0])
    assert not await shards.send(user)
    await shards.until_hits(*others)
    assert await shards.read(user, *others) == [False, True, True]
    inspections = await shards.services[0].inspector.inspect([user, *others])
    assert [one.cache for one in inspections] == ["away", "trusted", "trusted"]
    await asyncio.to_thread(shards.cluster.mend)
    await shards.until_hits(*shards.users)


@both_engines
async def test_no_read_is_stale_when_a_slot_is_moved_there_and_back(shards: Shards) -> None:
    user, *others = shards.users
    slot, done = hash_slot(user), asyncio.Event()

    async def events_flow() -> list[bool]:
        hits: list[bool] = []
        while not done.is_set():
            await shards.send(user, len(hits) % 2)
            await shards.read(user)
            hits += await shards.read(*others)
        return hits

    flowing = asyncio.get_running_loop().create_task(events_flow())
    for number in range(6):
        sent = shards.sent[user]
        await asyncio.to_thread(shards.cluster.move, slot, shards.masters[(number + 1) % 2])
        await eventually(lambda: shards.sent[user] > sent + 2 or flowing.done())  # noqa: B023  # awaited at once
    done.set()
    assert all(await flowing)
    await shards.until_hits(*shards.users)


async def test_slot_that_has_moved_is_used_at_its_new_master(shards: Shards) -> None:
    user, *others = shards.users
    await asyncio.to_thread(shards.cluster.move, hash_slot(user), shards.masters[1])
    assert await shards.read(user, *others) == [False, True, True], "MOVED"
    await shards.until_hits(*shards.users)
    assert await shards.send(user)


@pytest.mark.parametrize("moved", ["no key", "one key", "all keys"])
async def test_slot_that_is_being_moved_affects_only_its_users(shards: Shards, moved: str) -> None:
    """Commands for keys that have moved are answered ASK, and those for several keys TRYAGAIN."""
    user, *others = shards.users
    mask = shards.services[0].registry.full_mask
    await shards.services[0].reader.read({user: mask})
    await shards.services[0].reader.close()
    slot, to = hash_slot(user), shards.masters[1]
    source = await asyncio.to_thread(shards.cluster.begin_move, slot, to)
    count = {"no key": 0, "one key": 1, "all keys": 100}[moved]
    await asyncio.to_thread(shards.cluster.move_keys, slot, source, to, count)
    found = (await shards.services[0].reader.read({user: mask}))[user]
    assert {value.cached for value in found.values()} == {moved == "no key"}
    assert await shards.send(user) == (moved == "no key")
    assert (await shards.read(user, *others))[1:] == [True, True]
    await asyncio.to_thread(shards.cluster.end_move, slot, source, to)
    await shards.until_hits(*shards.users)
    assert not any([(await service.database.state.query()).owed for service in shards.services])


async def test_masters_are_used_at_their_own_address_when_the_url_names_a_balancer(
    cluster: ClusterServers, open_cache: OpenCache
) -> None:
    """Its next connection may lead to another node. It has many addresses, so that the order in which nodes are asked
    does not hide the fault."""
    masters = cluster.masters()
    async with AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(proxy(masters[n % 3].socket_path)) for n in range(12)]
        hosts = ",".join(way.url.removeprefix("redis://") for way in ways)
        cache = await open_cache(cluster.servers[0], url=f"redis+cluster://{hosts}/")
        cells = [
            Cell(next(user for user in map(str, range(1_000)) if hash_slot(user) in cluster.slots(master)), "f")
            for master in masters
        ]
        epoch, _ = await cache.read(cells)
        await asyncio.to_thread(cluster.move, hash_slot(cells[0].user_id), masters[1])

        async def refreshed() -> bool:
            nonlocal epoch
            epoch, held = await cache.read(cells)
            return held == [None] * len(cells)

        assert not await refreshed(), "MOVED"
        await eventually_async(refreshed)
        for number, way in enumerate(ways):
            way.target = masters[(number + 1) % 3].socket_path
        leases = await cache.lease(epoch, cells)
        fills = [Fill(cell, token, b"value", 60_000) for cell, token in zip(cells, leases, strict=True)]
        assert await cache.fill(epoch, fills) == [True] * len(cells)


async def test_replies_name_the_slots_of_users_without_deletion(cluster: ClusterServers, open_cache: OpenCache) -> None:
    cache = await open_cache(cluster.servers[0], url=cluster.url)
    cells = [Cell(f"user {number}", "f") for number in range(30)]
    await cache.drop(cells)
    master = cluster.masters()[0]
    slots = cluster.slots(master)
    master.kill()
    with pytest.raises(CacheUnavailable) as raised:
        await cache.drop(cells)
    assert set(raised.value.slots or ()) == slots


async def test_server_that_is_no_cluster_is_refused(
    valkey: EmbeddedServer, cluster: ClusterServers, open_cache: OpenCache, start_server: StartServer
) -> None:
    alone = start_server(VALKEY, port=free_port())
    for url, remedy in (
        (f"redis+cluster://127.0.0.1:{alone.port}/", r"write redis:// in the URL"),
        (f"redis://127.0.0.1:{cluster.servers[0].port}/0", r"write redis\+cluster:// in the URL"),
    ):
        with pytest.raises(CacheUnavailable) as raised:
            await (await open_cache(valkey, url=url)).check()
        assert re.search(remedy, raised.value.public_reason)
