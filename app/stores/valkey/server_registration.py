"""Records in the database which server is the cache: all processes must read from and delete on the same server.

With a Sentinel group, a proxy or a DNS name, two processes can be connected to different servers: one still reads from
the old master while the other deletes on the new one. The server's identity is therefore registered in the database
under a *generation*, a number that is part of every key. Before a process uses another server, it registers that server
under the next generation, which has no keys yet.

Interleavings prevented; R reads on the old server S, E ingests on the new server T:
  1. E registers T, E commits, E deletes on T, R hits on S    R's query of the registration is at most 50 ms old, and
                                                               E's delete returns 100 ms after E first saw T registered
  2. R registers S again, R hits an old value on S            S is registered under a new generation without keys
  3. E deletes on S, which is no longer registered            E checks again after its commit and is refused
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from app.errors import CacheRefused, StoreUnavailable
from app.features.clock import Clock
from app.profiles.ports import ObservedState, State
from app.telemetry import logger, warn

HOLD_BACK_S = 0.100
REGISTER_EVERY_S = 1.0
log = logger("stores.valkey")


class InMemoryState:
    """A state that no other process sees, for a cache without a database."""

    def __init__(self, database_id: str) -> None:
        self.last = State(database_id=database_id)

    def look(self) -> State:
        return self.last

    async def query(self) -> State:
        return self.last

    async def store(self, server: str, after: int) -> None:
        self.last = self.last._replace(server=server, generation=after + 1)


class ServerRegistration:
    """Registers the cache's server in the database, and notices when another server takes its place. One instance per
    cache and process."""

    def __init__(
        self,
        state: ObservedState,
        store: Callable[[str, int], Awaitable[None]],
        clock: Clock,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`store` registers a server in the database, under the number after the given generation. It does nothing if
        the generation is another one by then."""
        self.state = state
        self._store = store
        self._clock = clock
        self._pause = pause
        self._seen = State()
        self._seen_at = float("-inf")
        self._tried_at = float("-inf")
        self._registering: asyncio.Task[None] | None = None

    def require(self, server: str) -> State:
        """The registration, as of the last query.

        Raises:
            CacheRefused: another server is registered. `server` will be registered in the background.
        """
        state = self.state.last
        self._note(state)
        if state.server != server:
            self._register_soon(server)
            raise CacheRefused("another server is registered as the cache; this one is being registered")
        return state

    async def refresh(self) -> None:
        """Query the registration, so that the next command has the current generation in its keys. Raises
        `CacheRefused` if the database does not answer."""
        try:
            self._note(await self.state.query())
        except StoreUnavailable as error:
            raise CacheRefused("the registered server is unknown, because the database does not answer") from error

    async def settle(self) -> None:
        """Wait until `HOLD_BACK_S` after this process first saw the current generation and database. By then no process
        reads keys of an earlier one: see interleaving 1 of this module."""
        remaining = HOLD_BACK_S - (self._clock.monotonic() - self._seen_at)
        if remaining > 0:
            await self._pause(remaining)

    async def revise(self, server_after: Callable[[State], str]) -> None:
        """Register what `server_after` returns for the current registration, unless it is registered already: the
        identity of a server or, for a cluster, the list of slot owners as JSON. Raises `StoreUnavailable`."""
        state = await self.state.query()
        if state.server != (server := server_after(state)):
            await self._store(server, state.generation)
            state = await self.state.query()
            log.info("cache_registered", server=server[:12], generation=state.generation)
        self._note(state)

    async def close(self) -> None:
        """Wait for the registration that runs in the background, if there is one."""
        if self._registering is not None:
            await asyncio.gather(self._registering, return_exceptions=True)

    def _note(self, state: State) -> None:
        if not state.has_keys_of(self._seen):
            self._seen, self._seen_at = state, self._clock.monotonic()

    def _register_soon(self, server: str) -> None:
        now = self._clock.monotonic()
        busy = self._registering is not None and not self._registering.done()
        if busy or now - self._tried_at < REGISTER_EVERY_S:
            return
        self._tried_at = now
        self._registering = asyncio.get_running_loop().create_task(self._try_to_register(server))

    async def _try_to_register(self, server: str) -> None:
        try:
            await self.revise(lambda _: server)
        except StoreUnavailable as error:
            warn(log, error)("cache_not_registered", error=str(error))
