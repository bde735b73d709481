"""The cache of cells on Redis or Valkey ≥ 7.0.

Key: `pf:<epoch>:{<user>}:<feature>`, the user percent-encoded where needed; the braces are a Cluster hash tag. Fills
compare and set in one step: `SET … IFEQ` where the server has it, a small Lua script elsewhere. Which one is found out
by trying, per epoch, never by parsing a version. A command is sent only on a connection of the epoch it was made for.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, ResponseError

from app.errors import CacheRefused, CacheUnavailable
from app.features.clock import Clock
from app.profiles.codec import LEASE
from app.profiles.ports import Cell, Epoch, Fill
from app.stores.valkey.breaker import CircuitBreaker
from app.stores.valkey.connections import Command, Connections, converse, is_silent
from app.stores.valkey.registration import Registration
from app.telemetry import Metrics

SET_IF_EQUAL = b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    return 1
end
return 0
"""
DELETE_IF_EQUAL = b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
"""
_SAFE_IN_KEY = "-._~@:"
_KEYS_PER_DEL = 512


def key(epoch: Epoch, cell: Cell) -> bytes:
    """The key of a cell."""
    return f"pf:{epoch}:{{{quote(cell.user_id, safe=_SAFE_IN_KEY)}}}:{cell.feature}".encode()


class ValkeyCache:
    """Implements `app.profiles.ports.Cache`."""

    def __init__(
        self,
        *,
        url: str,
        database_id: str,
        timeout_ms: int,
        lease_ms: int,
        nonce: Callable[[], bytes],
        clock: Clock,
        metrics: Metrics,
        registration: Registration | None = None,
    ) -> None:
        """Raises `ValueError` where the URL is none. `registration`: as `Connections` has it."""
        self._registration = registration
        self._connections = Connections(url, database_id, timeout_ms / 1000, registration)
        self._lease_ms = lease_ms
        self._nonce = nonce
        self._clock = clock
        self._metrics = metrics
        self._breaker = CircuitBreaker(self.ping, metrics)
        self._without_ifeq: Epoch | None = None

    @property
    def available(self) -> bool:
        """False while the circuit is open."""
        return self._breaker.closed

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """One MGET."""
        async with self._timed("mget") as (connection, epoch):
            (held,) = await self._ask(connection, [(b"MGET", *(key(epoch, cell) for cell in cells))])
        return epoch, held

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """`SET … NX GET` for each, pipelined: the previous value, or our lease where there was none."""
        if not cells:
            return []
        leases = [LEASE + self._nonce() for _ in cells]
        async with self._timed("lease", epoch) as (connection, _):
            previous = await self._ask(
                connection,
                [
                    (b"SET", key(epoch, cell), lease, b"NX", b"GET", b"PX", self._lease_ms)
                    for cell, lease in zip(cells, leases, strict=True)
                ],
            )
        return [held or lease for held, lease in zip(previous, leases, strict=True)]

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Compare-and-set each, pipelined."""
        async with self._timed("fill", epoch) as (connection, _):
            if self._without_ifeq != epoch:
                replies = await converse(
                    connection,
                    [
                        (b"SET", key(epoch, fill.cell), fill.value, b"IFEQ", fill.token, b"PX", fill.ttl_ms)
                        for fill in fills
                    ],
                )
                if not _is_syntax_error(replies[0]):
                    return [reply is not None for reply in _checked(replies)]
                self._without_ifeq = epoch
            return [
                reply == 1
                for reply in await self._run_script(
                    connection,
                    SET_IF_EQUAL,
                    [(key(epoch, fill.cell), fill.token, fill.value, fill.ttl_ms) for fill in fills],
                )
            ]

    async def drop(self, cells: Collection[Cell]) -> None:
        """DEL, under the epoch of the connection that carries it, which is the one that readers use."""
        if not cells:
            return
        if self._registration is not None:
            self._registration.look()  # after the commit that made the cells untrue
        async with self._timed("del") as (connection, epoch):
            keys = [key(epoch, cell) for cell in cells]
            await self._ask(
                connection,
                [(b"DEL", *keys[start : start + _KEYS_PER_DEL]) for start in range(0, len(keys), _KEYS_PER_DEL)],
            )
        if self._registration is not None:
            await self._registration.settle()

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """Compare-and-delete each, pipelined."""
        async with self._timed("drop_exactly", epoch) as (connection, _):
            replies = await self._run_script(
                connection, DELETE_IF_EQUAL, [(key(epoch, cell), value) for cell, value in held]
            )
        return sum(replies)

    async def open(self) -> None:
        """Connect and register the server, so that the first read can use it. A cache that is away is no error."""
        with suppress(CacheUnavailable):
            await self._connections.register()

    async def ping(self) -> None:
        """Ask for a sign of life; raises `CacheUnavailable`."""
        async with self._connections.borrow() as (connection, _):
            await self._ask(connection, [(b"PING",)])

    async def check(self) -> None:
        """Try to write; raises `CacheUnavailable`, or `CacheRefused` where only that is refused. Leaves nothing."""
        async with self._connections.borrow() as (connection, epoch):
            name = b"pf:%b:check" % epoch.encode()
            await self._ask(connection, [(b"SET", name, b"", b"PX", 1_000), (b"DEL", name)])

    async def close(self) -> None:
        """Close the connections."""
        await self._breaker.close()
        if self._registration is not None:
            await self._registration.close()
        await self._connections.close()

    @asynccontextmanager
    async def _timed(self, command: str, epoch: Epoch | None = None) -> AsyncIterator[tuple[AbstractConnection, Epoch]]:
        started = self._clock.monotonic()
        try:
            async with self._connections.borrow() as (connection, current):
                if epoch is not None and current != epoch:
                    raise CacheRefused("the cache was restarted or replaced meanwhile")
                yield connection, current
        except CacheUnavailable as error:
            self._metrics.cache_errors.labels("silent" if is_silent(error) else "refused").inc()
            if is_silent(error):
                self._breaker.failed()
            raise
        self._breaker.succeeded()
        self._metrics.cache_seconds.labels(command).observe(self._clock.monotonic() - started)

    @staticmethod
    async def _ask(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
        return _checked(await converse(connection, commands))

    async def _run_script(
        self, connection: AbstractConnection, script: bytes, calls: Sequence[tuple[bytes | int, ...]]
    ) -> list[Any]:
        digest = hashlib.sha1(script, usedforsecurity=False).hexdigest()
        commands: list[Command] = [(b"EVALSHA", digest, 1, *call) for call in calls]
        replies = await converse(connection, commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            await self._ask(connection, [(b"SCRIPT", b"LOAD", script)])
            again = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            for place, reply in zip(again, await converse(connection, [commands[i] for i in again]), strict=True):
                replies[place] = reply
        return _checked(replies)


def _is_syntax_error(reply: object) -> bool:
    return isinstance(reply, ResponseError) and "syntax error" in str(reply).lower()


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, (ReadOnlyError, OutOfMemoryError)):
            raise CacheRefused(str(reply))
        if isinstance(reply, ResponseError):
            text = str(reply)
            if text.startswith(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN")):
                raise CacheUnavailable(text)
            raise CacheRefused(text)
    return replies
