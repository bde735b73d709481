"""Pools of connections to PostgreSQL, with a thread for each connection. Invariant: a connection is used only while it
leads to the database whose id this process observed last (`app.stores.postgres.observed_state`). This id is part of
every cache key. Interleaving prevented: 1. a standby is promoted while the old primary still runs; 2. the process
observes the new primary; 3. a value is computed on the old one, and cached as current."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import psycopg

from app.errors import StoreUnavailable
from app.profiles.ports import ObservedState
from app.stores.postgres.connection import CONNECT_TIMEOUT_S, STATEMENT_TIMEOUT_MS, Connection, connect, unavailable
from app.telemetry import logger

T = TypeVar("T")
WAIT_S = 5.0  # for an idle connection
CANCEL_S = 1.0
# The timeout of a statement if its caller sets no shorter one. The server's own limit is a little shorter.
LONGEST_S = STATEMENT_TIMEOUT_MS / 1000 + 5
STOPPING_S = 0.05
log = logger("stores.postgres")


class PooledConnection:
    def __init__(self, pool: Pool, connection: Connection | None) -> None:
        self._pool = pool
        self.connection = connection
        self._used = False
        self._running: asyncio.Future[Any] | None = None
        self._interrupting: asyncio.Task[None] | None = None

    @property
    def closing(self) -> bool:
        return self._pool.stopping

    @property
    def busy(self) -> list[asyncio.Future[Any]]:
        return [each for each in (self._running, self._interrupting) if each is not None and not each.done()]

    async def run(self, work: Callable[[Connection], T], timeout_s: float = LONGEST_S) -> T:
        """Call `work` with the connection, on a thread. Its statement is cancelled after `timeout_s` seconds, and when
        the caller is cancelled. If the server does not react to the cancellation, the connection is closed. Raises
        `StoreUnavailable` if no connection can be opened. If the connection is lost during the first call since
        it was lent, `work` is called once again with a new connection. Later calls are not repeated, because they may
        depend on a transaction that an earlier call has begun."""
        if self.closing:
            timeout_s = min(timeout_s, STOPPING_S)
        first, self._used = not self._used, True
        try:
            return await self._in_time(timeout_s, work, await self._connect())
        except psycopg.Error:
            lost = self.connection is not None and self.connection.raw.closed
            if not first or not lost or self._interrupting is not None:
                raise
        return await self._in_time(timeout_s, work, await self._connect())

    async def _in_time(self, timeout_s: float, work: Callable[[Connection], T], connection: Connection) -> T:
        late = asyncio.get_running_loop().call_later(timeout_s, self._interrupt)
        try:
            return await self._on_thread(work, connection)
        except asyncio.CancelledError:
            self._interrupt()
            raise
        finally:
            late.cancel()
            if self.busy and self._running is not None and self._running.done():
                await asyncio.wait(self.busy)  # or the cancellation could hit the next statement

    async def _connect(self) -> Connection:
        observer = self._pool.observer
        if self.connection is not None:
            if not self.connection.raw.closed and self.connection.server == observer.last.database_id:
                return self.connection
            self.connection.close()
            self.connection = None
        opened = await self._on_thread(self._open)
        # A pooler may answer for a server that does not.
        await self._in_time(CONNECT_TIMEOUT_S, Connection.begin_session, opened)
        if opened.server != observer.last.database_id:
            await observer.query()
            if opened.server != observer.last.database_id:
                opened.close()
                raise StoreUnavailable("the database does not answer: two servers claim to be its primary")
        return opened

    def _open(self) -> Connection:
        # Set on the thread: if the caller is cancelled meanwhile, the pool still gets the connection.
        self.connection = connect(self._pool.url, session=False)
        return self.connection

    async def _on_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        if self._pool.closed:
            raise StoreUnavailable("the database is closed")
        running = asyncio.get_running_loop().run_in_executor(self._pool.threads, call, *arguments)
        self._running = running
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved
            raise

    def _interrupt(self) -> None:
        if self.connection is not None and self.busy and (self._interrupting is None or self._interrupting.done()):
            self._interrupting = asyncio.get_running_loop().create_task(self._interrupted(self.connection))

    async def _interrupted(self, connection: Connection) -> None:
        try:
            await asyncio.to_thread(connection.raw.cancel_safe, timeout=CANCEL_S)
        except psycopg.Error as error:
            log.debug("statement_not_cancelled", error=str(error))
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running], timeout=CANCEL_S)
            if not self._running.done():
                disconnect(connection.raw)


class Pool:
    """A fixed number of connections, opened on first use. All methods raise `StoreUnavailable`."""

    def __init__(self, url: str, size: int, observer: ObservedState) -> None:
        self.url = url
        self.observer = observer
        self.threads = ThreadPoolExecutor(size, "postgres")
        self.stopping = False
        self.closed = False
        self._lent: set[PooledConnection] = set()
        self._returning: set[asyncio.Task[None]] = set()
        # The connection used last has its plans and the server's caches warm. None stands for one to be opened.
        self._idle: asyncio.LifoQueue[Connection | None] = asyncio.LifoQueue()
        for _ in range(size):
            self._idle.put_nowait(None)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[PooledConnection]:
        if self.closed:
            raise StoreUnavailable("the database is closed")
        try:
            async with asyncio.timeout(WAIT_S):
                lent = PooledConnection(self, await self._idle.get())
        except TimeoutError:
            raise StoreUnavailable("the database does not answer: all connections are busy") from None
        self._lent.add(lent)
        try:
            yield lent
        except psycopg.IntegrityError:
            raise
        except psycopg.Error as error:
            raise unavailable(error) from error
        finally:
            if lent.busy:  # the caller was cancelled
                task = asyncio.get_running_loop().create_task(self._give_back(lent))
                self._returning.add(task)
                task.add_done_callback(self._returning.discard)
            else:
                await self._give_back(lent)

    def interrupt(self) -> None:
        """The process is stopping: cancel running statements, and later ones `STOPPING_S` seconds after they begin."""
        self.stopping = True
        for lent in self._lent:
            lent._interrupt()  # noqa: SLF001

    async def close(self) -> None:
        self.closed = True
        self.interrupt()
        if self._returning:
            await asyncio.wait(self._returning)
        while not self._idle.empty():
            if (connection := self._idle.get_nowait()) is not None:
                connection.close()
        self.threads.shutdown(wait=False)

    async def _give_back(self, lent: PooledConnection) -> None:
        while busy := lent.busy:
            await asyncio.wait(busy)
        self._lent.discard(lent)
        if self.closed and lent.connection is not None:
            lent.connection.close()
        self._idle.put_nowait(lent.connection)


def disconnect(raw: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Shut down the connection's socket, so that a call that is waiting for the server fails at once."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(raw.fileno())) as copy:
        copy.shutdown(socket.SHUT_RDWR)
