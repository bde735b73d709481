"""A cluster of three masters with a replica each, on loopback: failovers, and slots that move.

`cluster` is shared by a whole run, emptied before each test and mended after it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from app.features.ids import HASH_SLOTS
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.processes import free_port
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.waiting import eventually_sync

MASTERS = 3
OPTIONS = (
    *("--cluster-enabled", "yes"),
    *("--cluster-require-full-coverage", "no"),
    *("--cluster-replica-validity-factor", "0", "--cluster-allow-replica-migration", "no"),
    *("--repl-diskless-sync-delay", "0", "--protected-mode", "no"),
)


def raw(server: EmbeddedServer, *command: str) -> bytes:
    """The reply to a command that redis-py would parse."""
    with closing(Redis(unix_socket_path=str(server.socket_path), socket_timeout=5)) as client:
        client.response_callbacks.clear()
        return bytes(client.execute_command(*command))  # type: ignore[no-untyped-call]


def address(server: EmbeddedServer) -> tuple[str, int]:
    """The host and port of a server."""
    parts = urlsplit(server.url)
    return str(parts.hostname), int(parts.port or 0)


class ClusterServers:
    """The six servers; the first three began as masters. Replicas take over by themselves `failover_ms` after their
    master has become silent, by default never within a test."""

    def __init__(self, start: StartServer, flavour: str, *, failover_ms: int = 60_000) -> None:
        ports = [free_port() for _ in range(2 * MASTERS)]
        extra = [("--cluster-port", str(free_port())) for _ in ports]
        options = (*OPTIONS, "--cluster-node-timeout", str(failover_ms))
        self.servers = [
            start(flavour, port=port, options=(*options, *bus)) for port, bus in zip(ports, extra, strict=True)
        ]
        masters, replicas = self.servers[:MASTERS], self.servers[MASTERS:]
        for number, server in enumerate(self.servers):
            ask(server, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(masters):
            first, last = number * HASH_SLOTS // MASTERS, (number + 1) * HASH_SLOTS // MASTERS - 1
            ask(server, "CLUSTER", "ADDSLOTSRANGE", first, last)
        for server, (_, bus) in zip(self.servers[1:], extra[1:], strict=True):
            ask(masters[0], "CLUSTER", "MEET", *address(server), bus)
        eventually_sync(lambda: all("known_nodes:6" in self._info(server) for server in self.servers))
        for master, replica in zip(masters, replicas, strict=True):
            eventually_sync(partial(self._replicate, replica, master))
        eventually_sync(self.whole)

    @property
    def url(self) -> str:
        nodes = (f"{host}:{port}" for host, port in map(address, self.servers[:MASTERS]))
        return f"redis+cluster://{','.join(nodes)}/"

    def whole(self) -> bool:
        """Whether every node sees all slots served, and every replica is connected to its master."""
        links = [ask(server, "INFO", "replication") for server in self.servers]
        linked = all(link["role"] == "master" or link["master_link_status"] == "up" for link in links)
        return linked and all("cluster_state:ok" in self._info(server) for server in self.servers)

    def masters(self) -> list[EmbeddedServer]:
        return [server for server in self.servers if server.running() and ask(server, "ROLE")[0] == b"master"]

    def owner(self, slot: int) -> EmbeddedServer:
        """The master that says itself that it owns a slot."""
        return next(server for server in self.masters() if slot in self.slots(server))

    def slots(self, server: EmbeddedServer) -> set[int]:
        ranges = next(line.split()[8:] for line in self._nodes(server) if "myself" in line)
        pairs = [part.split("-") for part in ranges if part[0] != "["]
        return {slot for ends in pairs for slot in range(int(ends[0]), int(ends[-1]) + 1)}

    def replica_of(self, master: EmbeddedServer) -> EmbeddedServer:
        own = self._id(master)
        return next(
            s for s in self.servers if any("myself" in line and own in line.split()[3] for line in self._nodes(s))
        )

    def mend(self) -> None:
        """Start the servers that were killed, continue those that were paused, and wait for all."""
        for server in self.servers:
            if server.running():
                server.signal(signal.SIGCONT)
            else:
                server.start()
        eventually_sync(self.whole)

    def flush(self) -> None:
        for server in self.masters():
            ask(server, "FLUSHALL")

    def lose_writes(self, master: EmbeddedServer) -> EmbeddedServer:
        """Pause the replica of a master and cut it off, so that it lacks what the master does next. Return it."""
        replica = self.replica_of(master)
        replica.signal(signal.SIGSTOP)
        ask(master, "CLIENT", "KILL", "TYPE", "replica")
        return replica

    def take_over(self, replica: EmbeddedServer) -> None:
        """Let a replica, paused or not, become the master at once, whatever it lacks."""
        replica.signal(signal.SIGCONT)
        eventually_sync(lambda: self._took_over(replica))

    def until_replica(self, server: EmbeddedServer) -> None:
        """Wait until a former master has the data of another one."""
        eventually_sync(lambda: ask(server, "ROLE")[0] == b"slave" and ask(server, "ROLE")[3] == b"connected")

    def _took_over(self, replica: EmbeddedServer) -> bool:
        with suppress(ResponseError):
            ask(replica, "CLUSTER", "FAILOVER", "TAKEOVER")
        return bool(ask(replica, "ROLE")[0] == b"master")

    def begin_move(self, slot: int, to: EmbeddedServer) -> EmbeddedServer:
        """Begin to move a slot; return its owner. Commands for its keys are answered ASK or TRYAGAIN, if keys moved."""
        source = self.owner(slot)
        ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to))
        return source

    def move_keys(self, slot: int, source: EmbeddedServer, to: EmbeddedServer, count: int = 10_000) -> None:
        keys = ask(source, "CLUSTER", "GETKEYSINSLOT", slot, count)
        if keys:
            ask(source, "MIGRATE", *address(to), "", 0, 5_000, "KEYS", *keys)

    def end_move(self, slot: int, source: EmbeddedServer, to: EmbeddedServer) -> None:
        for server in (to, source, *self.masters()):
            ask(server, "CLUSTER", "SETSLOT", slot, "NODE", self._id(to))

    def move(self, slot: int, to: EmbeddedServer) -> None:
        """Move a slot with its keys."""
        source = self.begin_move(slot, to)
        self.move_keys(slot, source, to)
        self.end_move(slot, source, to)

    def _info(self, server: EmbeddedServer) -> str:
        return raw(server, "CLUSTER", "INFO").decode()

    def _nodes(self, server: EmbeddedServer) -> list[str]:
        return raw(server, "CLUSTER", "NODES").decode().splitlines()

    def _id(self, server: EmbeddedServer) -> str:
        return str(next(line.split()[0] for line in self._nodes(server) if "myself" in line))

    def _replicate(self, replica: EmbeddedServer, master: EmbeddedServer) -> bool:
        with suppress(RedisError):  # it has not met the master yet
            ask(replica, "CLUSTER", "REPLICATE", self._id(master))
            return True
        return False


@pytest.fixture(scope="session")
def shared_clusters(start_server: StartServer) -> Callable[[str], ClusterServers]:
    """One cluster of each flavour for the whole run. It is started on first use, and emptied on each use."""
    running: dict[str, ClusterServers] = {}

    def shared(flavour: str) -> ClusterServers:
        if flavour not in running:
            running[flavour] = ClusterServers(start_server, flavour)
        running[flavour].flush()
        return running[flavour]

    return shared


@pytest.fixture
def cluster(shared_clusters: Callable[[str], ClusterServers]) -> Iterator[ClusterServers]:
    """An empty cluster. The test may pause and kill its servers, and move its slots; all is mended afterwards."""
    shared = shared_clusters(VALKEY)
    yield shared
    shared.mend()
