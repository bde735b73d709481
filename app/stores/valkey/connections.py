"""Connections to a cache server. Each learns the server's identity before its first command.

The identity is the server's `run_id`, which changes with every start, and the number of the logical database; for a
node of a cluster, the `run_id` and the replication id, which changes when the node becomes a master.

There are two connections, so that the commands of requests never queue behind a thousand stores of computed values.
"""

from __future__ import annotations

import asyncio
import re
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from app.concurrency.tasks import end
from app.errors import CacheUnavailable
from app.stores.valkey.pipelined_connection import PipelinedConnection
from app.stores.valkey.pool import AWAY, IS_CLUSTER, IS_NO_CLUSTER, blocking_pool, public_reason

_MOVES = 3
_RUN_ID = re.compile(rb"run_id:([0-9a-f]+)")
_REPLICATION_ID = re.compile(rb"master_replid:([0-9a-f]+)")
_CLUSTER_MODE = re.compile(rb"(?:redis|server)_mode:cluster")


class Use(Enum):
    """`FRONT` is the connection for commands that requests wait for, `BACK` for storing values and for bulk work."""

    FRONT = 0
    BACK = 1


class Connections:
    """The two connections of a process to its cache, or to a node of a cluster, opened on first use."""

    def __init__(self, url: str, timeout_s: float, *, in_cluster: bool = False) -> None:
        self._in_cluster = in_cluster
        self._timeout_s = timeout_s
        self._newest = ""
        self._greeted: WeakKeyDictionary[AbstractConnection, str] = WeakKeyDictionary()
        self._connections: dict[Use, PipelinedConnection] = {}
        self._opening: dict[Use, asyncio.Task[None]] = {}
        # Used only to make connections, because it handles TLS, passwords and Sentinel.
        self._pool: Any = blocking_pool(
            url, timeout_s, len(Use), redis_connect_func=self._greet, lib_name=None, lib_version=None
        )

    async def get(self, use: Use = Use.FRONT) -> PipelinedConnection:
        """The connection for `use`, opened if necessary, to the server that this process reached last.

        Raises:
            CacheUnavailable: no server answers in time.
        """
        # 1. One connection reaches server S; 2. the address moves to T while S still runs; 3. the other connection
        # reaches T and sends a DEL; 4. a read on the first would hit the old value on S. So both use the newest server.
        for _ in range(_MOVES):
            if (connection := self.ready(use)) is not None:
                return connection
            opening = self._opening.get(use)
            if opening is None:
                opening = self._opening[use] = asyncio.get_running_loop().create_task(self._open(use))
                opening.add_done_callback(lambda task: self._opened(use, task))
            # Shielded: a cancelled caller must not cancel the connection of other callers. The loop checks again,
            # because the other connection may have reached another server meanwhile.
            await asyncio.shield(opening)
        raise CacheUnavailable("the connection was lost again and again")

    def ready(self, use: Use) -> PipelinedConnection | None:
        """The connection for `use` if it is open and leads to the server that this process reached last."""
        connection = self._connections.get(use)
        usable = connection is not None and not connection.closed and connection.server == self._newest
        return connection if usable else None

    async def close(self) -> None:
        await end(list(self._opening.values()))
        for connection in self._connections.values():
            connection.close()
        await self._pool.aclose()

    async def _open(self, use: Use) -> None:
        if (before := self._connections.pop(use, None)) is not None:
            before.close("the cache has moved to another server")
        link: AbstractConnection = self._pool.make_connection()
        try:
            await link.connect()  # type: ignore[no-untyped-call]  # as redis-py left it
        except (*AWAY, EOFError) as error:
            await link.disconnect(nowait=True)
            raise CacheUnavailable(f"{type(error).__name__}: {error}", public_reason(error)) from error
        except BaseException:
            await link.disconnect(nowait=True)
            raise
        self._connections[use] = PipelinedConnection(link, self._greeted[link], self._timeout_s)

    def _opened(self, use: Use, task: asyncio.Task[None]) -> None:
        del self._opening[use]
        if not task.cancelled():
            task.exception()  # retrieved, because all waiters may have been cancelled

    async def _greet(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server", *(["replication"] if self._in_cluster else []))
        reply = await connection.read_response()
        info = reply if isinstance(reply, bytes) else b""
        found = _RUN_ID.search(info)
        if found is None:
            raise RedisConnectionError("the server does not report its run_id")
        if (_CLUSTER_MODE.search(info) is not None) != self._in_cluster:
            raise RedisConnectionError(IS_NO_CLUSTER if self._in_cluster else IS_CLUSTER)
        if self._in_cluster and (replication := _REPLICATION_ID.search(info)) is not None:
            self._newest = self._greeted[connection] = f"{found[1].decode()}:{replication[1].decode()}"
            return
        # Each logical database is a separate cache: a DEL in one does not reach another. In database 0 the identity
        # is the bare run_id, as older releases register it.
        number = f"/{connection.db}" if connection.db else ""
        self._newest = self._greeted[connection] = found[1].decode() + number
