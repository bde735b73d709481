"""Connections to the cache, each with the epoch of the server at its other end.

The epoch is a short hash of the database's id, the server's `run_id`, which every server start draws anew, and the
generation under which that server is registered. A connection learns the `run_id` before its first command, and keys
are built only from the epoch of the connection that will carry them. So after a restart with old contents, or a
failover, old keys are out of reach.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from app.errors import CacheRefused, CacheUnavailable, StoreUnavailable
from app.stores.valkey.pool import blocking_pool
from app.stores.valkey.registration import Registration

MAX_CONNECTIONS = 16
_RUN_ID = re.compile(rb"run_id:([0-9a-f]+)")

Command = tuple[bytes | str | int, ...]


class Connections:
    """A pool whose connections know their epoch."""

    def __init__(self, url: str, database_id: str, timeout_s: float, registration: Registration | None = None) -> None:
        """Without a `registration` every server is taken for the cache: for one process, or one that never moves."""
        self._database_id = database_id
        self._registration = registration
        self._servers: WeakKeyDictionary[AbstractConnection, str] = WeakKeyDictionary()
        self._newest = ""
        self._pool: Any = blocking_pool(
            url, timeout_s, MAX_CONNECTIONS, redis_connect_func=self._greet, lib_name=None, lib_version=None
        )

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[tuple[AbstractConnection, str]]:
        """A connection and its epoch.

        Raises:
            CacheUnavailable: the server does not answer in time, or the connection breaks.
            CacheRefused: the server refuses the command, or is not the one registered.
        """
        connection: AbstractConnection | None = None
        try:
            connection = taken = await self._taken()
            if self._servers[taken] != self._newest:
                # 1. C1 greets server S; 2. the address moves to T, and S lives on; 3. C2 greets T and sends it a DEL;
                # 4. a read over C1 would hit what S still holds. So every connection is to the server greeted last.
                await taken.disconnect(nowait=True)
                await taken.connect()  # type: ignore[no-untyped-call]  # as redis-py left it
            yield taken, self._epoch(self._servers[taken])
        except CacheUnavailable:
            raise  # found in a reply, or before anything was sent: the connection is sound
        except (ReadOnlyError, OutOfMemoryError) as error:
            raise CacheRefused(str(error)) from error
        except (RedisError, OSError, TimeoutError, EOFError) as error:
            if connection is not None:
                await connection.disconnect(nowait=True)
            raise CacheUnavailable(f"{type(error).__name__}: {error}") from error
        except BaseException:
            # Cancelled between command and reply: whatever comes next on this connection is not ours.
            if connection is not None:
                await connection.disconnect(nowait=True)
            raise
        finally:
            if connection is not None:
                await self._pool.release(connection)

    async def _taken(self) -> AbstractConnection:
        try:
            connection: AbstractConnection = await self._pool.get_connection()
        except RedisConnectionError as error:
            if "No connection available" in str(error):  # load here, not the server's silence
                raise CacheRefused(f"more than {MAX_CONNECTIONS} commands are under way") from error
            raise
        return connection

    async def register(self) -> None:
        """Register the server that answers now. Raises `CacheUnavailable`."""
        if self._registration is None:
            return
        with suppress(CacheRefused):
            async with self.borrow():
                return
        try:
            await self._registration.register(self._newest)
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.aclose()

    async def _greet(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        reply = await connection.read_response()
        found = _RUN_ID.search(reply if isinstance(reply, bytes) else b"")
        if found is None:
            raise RedisConnectionError("the server does not tell its run_id")
        self._newest = self._servers[connection] = found[1].decode()

    def _epoch(self, server: str) -> str:
        generation = self._registration.generation(server) if self._registration is not None else 0
        return hashlib.sha256(f"{self._database_id}:{server}:{generation}".encode()).hexdigest()[:12]


async def converse(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    """Send commands at once and read their replies; a refusal is returned in its place, as the exception.

    Raises:
        RedisError: the connection broke or timed out; it is closed then.
    """
    if not connection.is_connected:
        # redis-py would connect again here, maybe to the next server, with keys built for the last one.
        raise RedisConnectionError("the connection is closed")
    await connection.send_packed_command(connection.pack_commands(commands))
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response(disconnect_on_error=True))
        except ResponseError as error:
            replies.append(error)
    return replies


def is_silent(error: CacheUnavailable) -> bool:
    """Whether the server did not answer at all, as opposed to refusing."""
    return not isinstance(error, CacheRefused)
