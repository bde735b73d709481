"""Connections to the cache, each with the epoch of the server at its other end.

The epoch is a short hash of the database's id and the server's `run_id`, which every server start draws anew. A
connection learns it before its first command, and keys are built only from the epoch of the connection that will carry
them. So after a restart with old contents, or a failover, old keys are out of reach.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio.connection import AbstractConnection, BlockingConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, ResponseError

from app.errors import CacheRefused, CacheUnavailable

MAX_CONNECTIONS = 16
_RUN_ID = re.compile(rb"run_id:([0-9a-f]+)")

Command = tuple[bytes | str | int, ...]


class Connections:
    """A pool whose connections know their epoch."""

    def __init__(self, url: str, database_id: str, timeout_s: float) -> None:
        self._database_id = database_id
        self._epochs: WeakKeyDictionary[AbstractConnection, str] = WeakKeyDictionary()
        self._newest = ""
        self._pool: Any = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            redis_connect_func=self._greet,
            lib_name=None,
            lib_version=None,
        )

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[tuple[AbstractConnection, str]]:
        """A connection and its epoch.

        Raises:
            CacheUnavailable: the server does not answer in time, or the connection breaks.
            CacheRefused: the server refuses the command.
        """
        connection: AbstractConnection | None = None
        try:
            connection = taken = await self._pool.get_connection()
            if self._epochs[taken] != self._newest:
                # 1. C1 greets server S; 2. the address moves to T, and S lives on; 3. C2 greets T and sends it a DEL;
                # 4. a read over C1 would hit what S still holds. So every connection is to the server greeted last.
                await taken.disconnect(nowait=True)
                await taken.connect()
            yield taken, self._epochs[taken]
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
        identity = self._database_id.encode() + b":" + found[1]
        self._newest = self._epochs[connection] = hashlib.sha256(identity).hexdigest()[:12]


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
