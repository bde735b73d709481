"""The deployment on several hosts: API processes and workers on some, and each server on a host of its own.

The database is PostgreSQL, with a synchronous standby. The cache is one server, or a cluster of three masters with a
replica each.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import psycopg

from app.errors import StoreUnavailable
from app.settings.parsers import PostgresUrl
from app.settings.parsers import postgres_url as parsed
from app.stores.migrate import migrate
from app.stores.postgres.connection import Connection, connect
from app.stores.valkey.embedded import EmbeddedServer, server_binary
from tests.support.cluster import ClusterServers, address
from tests.support.postgres import USER, PostgresServer, account
from tests.support.processes import free_port
from tests.support.servers import OPTIONS, VALKEY
from tests.torture.deployment import USUAL_SKEW_NS, Deployment, ProcessClock, ProcessSlot
from tests.torture.network import SUBNET, Host, Network

DATABASE = "profiles"
HOSTS = ("host1", "host2", "host3")
WORKERS = 2
ROWS_S = 60.0
STANDBY_S = 60.0
# A server that is gone without a trace is noticed within seconds.
POSTGRES = {
    "max_connections": "150",
    "wal_sender_timeout": "2s",
    "wal_receiver_timeout": "2s",
    "wal_retrieve_retry_interval": "200ms",
}
CHECK_INDEXES = """
SELECT bt_index_check(index.oid, true) FROM pg_class AS index JOIN pg_am AS method ON method.oid = index.relam
WHERE index.relkind = 'i' AND method.amname = 'btree' AND index.relnamespace = CAST('public' AS regnamespace)
"""


class HostServer(EmbeddedServer, kw_only=True):
    """A cache or queue server on a host. This program reaches it by the Unix socket, whatever the network does."""

    host: Host

    @classmethod
    def on(cls, host: Host, directory: Path, options: tuple[str, ...] = OPTIONS, *, port: int = 0) -> HostServer:
        command = directory.with_suffix(".sh")
        command.write_text(f'#!/bin/sh\nexec {" ".join(host.prefix)} {server_binary()} "$@"\n')
        command.chmod(0o755)
        options = (*options, "--bind", host.address, "--protected-mode", "no")
        return cls(
            directory, directory.with_suffix(".sock"), options, binary=str(command), port=port or free_port(), host=host
        )

    @property
    def url(self) -> str:
        return f"redis://{self.host.address}:{self.port}"


class PostgresPair:
    """A primary and its synchronous standby. A standby that is promoted gets the old primary as its standby."""

    def __init__(self, network: Network) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pf-pg-"))
        self.root.chmod(0o755)
        if (name := account()) is not None:
            shutil.chown(self.root, name)
        self.hosts: dict[PostgresServer, Host] = {}
        for name in ("postgres1", "postgres2"):
            host = network.host(name)
            server = PostgresServer(self.root, name, prefix=host.prefix, **POSTGRES)
            server.host = host.address
            self.hosts[server] = host
        self.primary, self.standby = self.hosts

    @property
    def url(self) -> PostgresUrl:
        """The URL of both servers; a client looks for the one that accepts writes."""
        hosts = ",".join(f"{server.host}:{server.port}" for server in self.hosts)
        return parsed(f"postgresql://{USER}@{hosts}/{DATABASE}")

    def start(self) -> None:
        self.primary.create()
        with (self.primary.data / "pg_hba.conf").open("a") as file:
            file.write(f"host all,replication all {SUBNET} trust\n")
        self.primary.start()
        self.primary.execute(f"CREATE DATABASE {DATABASE}")
        self.standby.follow(self.primary, self.primary.url(tcp=True))

    def restart(self, *, kill: bool) -> None:
        """Restart the primary. If `kill`, it recovers."""
        self.primary.restart(kill=kill)
        self.wait_for_standby()

    def fail_over(self) -> None:
        """Kill the primary and promote the standby."""
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def replace_standby(self) -> None:
        """Make the old primary the standby of the new one. Another fault may cut the two off meanwhile."""
        deadline = time.monotonic() + STANDBY_S
        while True:
            try:
                self.standby.follow(self.primary, self.primary.url(tcp=True))
                return
            except (AssertionError, psycopg.Error):
                self.standby.kill()
                if time.monotonic() > deadline:
                    raise

    def wait_for_standby(self) -> None:
        """Wait until the standby has what the primary shows. A primary that recovers shows commits which the standby
        may lack; they were not acknowledged, and a failover would lose them after they were read."""
        self.primary.execute("SELECT pg_logical_emit_message(true, 'torture', 'a commit')")

    def close(self) -> None:
        for server in self.hosts:
            server.kill()
        shutil.rmtree(self.root, ignore_errors=True)


class HostsDeployment(Deployment):
    """Servers and processes on hosts of a network."""

    def __init__(self, *, cluster: bool = False, mutant: str | None = None, hesitate: str = "") -> None:
        self.network = Network()
        super().__init__(mutant=mutant, hesitate=hesitate)
        self.hosts = [self.network.host(name) for name in HOSTS]
        self.postgres = PostgresPair(self.network)
        self.postgres_lock = asyncio.Lock()
        self.caches = [self.cache]
        self.cluster: ClusterServers | None = None
        self._clustered = cluster
        self._connection: Connection | None = None
        self._connection_lock = threading.Lock()

    def _server(self, name: str) -> EmbeddedServer:
        return HostServer.on(self.network.host(name), self.directory / name)

    def _start_node(self, _: str, *, port: int, options: tuple[str, ...]) -> EmbeddedServer:
        host = self.network.host(f"cache{len(self.caches) + 1}")
        node = HostServer.on(host, self.directory / host.name, (*OPTIONS, *options), port=port)
        node.start()
        self.caches.append(node)
        return node

    def a_cache(self, random: Random) -> EmbeddedServer:
        return random.choice(self.caches)

    @property
    def servers(self) -> list[str]:
        """The addresses of the servers that processes use."""
        return [*(address(server)[0] for server in (*self.caches, self.queue)), *(s.host for s in self.postgres.hosts)]

    @property
    def store(self) -> PostgresUrl:
        return self.postgres.url

    async def open(self) -> None:
        await asyncio.to_thread(self.postgres.start)
        await asyncio.to_thread(migrate, self.store)
        await asyncio.to_thread(self.queue.start)
        if self._clustered:
            self.caches.clear()
            self.cluster = await asyncio.to_thread(ClusterServers, self._start_node, VALKEY, failover_ms=1_000)
        else:
            await asyncio.to_thread(self.cache.start)
        clocks = [
            ProcessClock(self.directory / f"clock of {host.name}", number % 2 * USUAL_SKEW_NS)
            for number, host in enumerate(self.hosts)
        ]
        places = list(zip(self.hosts, clocks, strict=True))
        self.apis = [self._place("serve", host, clock) for host, clock in places]
        self.workers = [self._place("worker", host, clock) for host, clock in places[:WORKERS]]
        await asyncio.gather(*(self.start(slot) for slot in [*self.apis, self.workers[0]]))

    def _place(self, role: str, host: Host, clock: ProcessClock) -> ProcessSlot:
        url = self.cache.url if self.cluster is None else self.cluster.url
        return ProcessSlot(role, url, clock, host.address, host.prefix)

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Query the primary directly; wait if it is down."""
        deadline = time.monotonic() + ROWS_S
        while True:
            try:
                with self._connection_lock:
                    if self._connection is None:
                        self._connection = connect(self.postgres.primary.url(DATABASE))
                    return self._connection.execute(sql, parameters).fetchall()
            except (psycopg.OperationalError, StoreUnavailable):
                self._connection = None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def damage(self) -> list[str]:
        execute = self.postgres.primary.execute
        execute("CREATE EXTENSION IF NOT EXISTS amcheck", DATABASE)
        try:
            execute(CHECK_INDEXES, DATABASE)
        except psycopg.Error as error:
            return [str(error)]
        return []

    async def close(self) -> None:
        await super().close()
        for server in self.caches:
            server.kill()
        if self._connection is not None:
            self._connection.raw.close()
        await asyncio.to_thread(self.postgres.close)
