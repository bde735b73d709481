"""Lanes to the cache, each with the epoch of the server at its other end.

The epoch is a short hash of the database's id, the identity of the server, and the generation under which that server
is registered. The identity is the server's `run_id`, which every server start draws anew, with the number of the
logical database. A lane learns it before its first command, and keys are built only from the epoch of the lane that
will carry them. So after a restart with old contents, or a failover, old keys are out of reach.

There are two lanes: what somebody waits for must not queue behind a thousand fills.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from contextlib import suppress
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from app.concurrency.tasks import end
from app.errors import CacheRefused, CacheUnavailable, StoreUnavailable
from app.stores.valkey.pipelined_connection import PipelinedConnection
from app.stores.valkey.pool import AWAY, blocking_pool, told
from app.stores.valkey.server_registration import ServerRegistration

_MOVES = 3
_RUN_ID = re.compile(rb"run_id:([0-9a-f]+)")


class Use(Enum):
    """Which lane: `FRONT` for what a request waits for, `BACK` for fills and whatever comes in bulk."""

    FRONT = 0
    BACK = 1


class Connections:
    """The lanes of one process, connected when they are needed."""

    def __init__(
        self, url: str, database_id: str, timeout_s: float, registration: ServerRegistration | None = None
    ) -> None:
        """Without a `registration` every server is taken for the cache: for one process, or one that never moves."""
        self._database_id = database_id
        self._registration = registration
        self._timeout_s = timeout_s
        self._newest = ""
        self._greeted: WeakKeyDictionary[AbstractConnection, str] = WeakKeyDictionary()
        self._known: tuple[str, int] = ("", 0)
        self._epoch = ""
        self._lanes: dict[Use, PipelinedConnection] = {}
        self._opening: dict[Use, asyncio.Task[None]] = {}
        # Never asked for a connection, only to make them: it knows what the URL says of TLS, passwords and Sentinel.
        self._pool: Any = blocking_pool(
            url, timeout_s, len(Use), redis_connect_func=self._greet, lib_name=None, lib_version=None
        )

    async def lane(self, use: Use = Use.FRONT) -> PipelinedConnection:
        """A lane to the server that was greeted last.

        Raises:
            CacheUnavailable: the server does not answer in time, or is none.
        """
        # 1. One lane greets server S; 2. the address moves to T, and S lives on; 3. the other greets T and sends it a
        # DEL; 4. a read over the first would hit what S still holds. So every lane is to the server greeted last.
        for _ in range(_MOVES):
            lane = self._lanes.get(use)
            if lane is not None and not lane.closed and lane.server == self._newest:
                return lane
            opening = self._opening.get(use)
            if opening is None:
                opening = self._opening[use] = asyncio.get_running_loop().create_task(self._open(use))
                opening.add_done_callback(lambda task: self._opened(use, task))
            # Shielded: who is cancelled must not take the lane from the others who wait for it. And looked at again
            # after the wait, in which the other lane may have met another server.
            await asyncio.shield(opening)
        raise CacheUnavailable("the connection does not last")

    def epoch(self, lane: PipelinedConnection) -> str:
        """The epoch for keys that go over `lane`; raises `CacheRefused` where its server is not the one registered."""
        generation = self._registration.generation(lane.server) if self._registration is not None else 0
        if self._known != (lane.server, generation):
            identity = f"{self._database_id}:{lane.server}:{generation}"
            self._epoch = hashlib.sha256(identity.encode()).hexdigest()[:12]
            self._known = (lane.server, generation)
        return self._epoch

    async def register(self) -> None:
        """Register the server that answers now. Raises `CacheUnavailable`."""
        if self._registration is None:
            return
        lane = await self.lane()
        with suppress(CacheRefused):
            self.epoch(lane)
            return
        try:
            await self._registration.register(lane.server)
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from error

    async def close(self) -> None:
        """Close every lane."""
        await end(list(self._opening.values()))
        for lane in self._lanes.values():
            lane.close()
        await self._pool.aclose()

    async def _open(self, use: Use) -> None:
        if (before := self._lanes.pop(use, None)) is not None:
            before.close("the cache has moved to another server")
        connection: AbstractConnection = self._pool.make_connection()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # as redis-py left it
        except (*AWAY, EOFError) as error:
            await connection.disconnect(nowait=True)
            raise CacheUnavailable(f"{type(error).__name__}: {error}", told(error)) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._lanes[use] = PipelinedConnection(connection, self._greeted[connection], self._timeout_s)

    def _opened(self, use: Use, task: asyncio.Task[None]) -> None:
        del self._opening[use]
        if not task.cancelled():
            task.exception()  # marked as seen: every waiter may be gone

    async def _greet(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "server")
        reply = await connection.read_response()
        found = _RUN_ID.search(reply if isinstance(reply, bytes) else b"")
        if found is None:
            raise RedisConnectionError("the server does not tell its run_id")
        # A logical database is a cache of its own: a DEL in one leaves the keys of another. Number 0 is the bare
        # run_id, as older releases register it.
        number = f"/{connection.db}" if connection.db else ""
        self._newest = self._greeted[connection] = found[1].decode() + number


def is_silent(error: CacheUnavailable) -> bool:
    """Whether the server did not answer at all, as opposed to refusing."""
    return not isinstance(error, CacheRefused)
