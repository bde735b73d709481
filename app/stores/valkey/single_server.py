"""Sends commands to a single cache server. Determines the epoch of their keys, and has a circuit breaker.

The epoch, a part of every key, depends on the identity of the server at the other end of the connection. A failover or
a restart changes the identity. So no key from before is read again, even if the server still has it.

The circuit opens after `TRIP_AFTER` failures in a row. Requests then no longer wait for timeouts, and a background task
probes the server. The first answer closes the circuit again.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hiredis import ReplyError

from app.concurrency.tasks import end
from app.errors import CacheRefused, CacheUnavailable, StoreUnavailable
from app.profiles.ports import Epoch, State
from app.stores.valkey.connections import Commands, Connections, PipelinedConnection, Use, error_in
from app.stores.valkey.registration import ServerRegistration, key_epoch
from app.telemetry import Metrics, logger

TRIP_AFTER = 3
PROBE_EVERY_S = 0.2
log = logger("stores.valkey")


class SingleServer:
    """Sends commands to a server, or to a Sentinel group's master. `available`: whether the circuit is closed."""

    def __init__(self, url: str, timeout_s: float, registration: ServerRegistration, metrics: Metrics) -> None:
        self.registration = registration
        self.available = True
        self._metrics = metrics
        self._connections = Connections(url, timeout_s)
        self._known: tuple[str, State | None] = ("", None)
        self._epoch = ""
        self._failures = 0  # in a row
        self._probing: asyncio.Task[None] | None = None
        metrics.cache_available.set(1)

    async def open(self) -> None:
        """Connect. Unless the server is the registered cache, register it as such. Raises `CacheUnavailable`."""
        connection = await self._connections.get()
        with suppress(CacheRefused):
            self.epoch(connection)
            return
        try:
            await self.registration.revise(lambda _: connection.server)
        except StoreUnavailable as error:
            raise CacheUnavailable(str(error)) from error

    async def send(
        self,
        use: Use,
        user_ids: Sequence[str],
        commands: Commands,
        epoch: Epoch | None = None,
        allowed: tuple[str, ...] = (),
        *,
        proven: bool = False,
    ) -> tuple[Epoch, list[Any]]:
        """Send commands for some users. Return the epoch of the keys, and the replies. See `Cluster.send`. Raises
        `CacheUnavailable` if the server does not answer, and `CacheRefused` if the connection has another epoch than
        `epoch`, another server is registered, or the server refuses a command."""
        try:
            connection = await self._connections.get(use)
            # No await from here to `ask`: keys built for this connection must be sent on this connection.
            current = self.epoch(connection)
            if epoch is not None and current != epoch:
                raise CacheRefused("the cache was restarted or replaced during the request")
            replies = await connection.ask(commands(current, range(len(user_ids))))
            for reply in replies:
                if isinstance(reply, ReplyError) and (error := error_in(reply, allowed)) is not None:
                    raise error
        except CacheUnavailable as failure:
            refused = isinstance(failure, CacheRefused)
            self._metrics.cache_errors.labels("refused" if refused else "silent").inc()
            if not refused:
                self._failed()
            raise
        self._failures = 0
        return current, replies

    def epoch(self, connection: PipelinedConnection) -> Epoch:
        """The epoch of keys sent on this connection. Raises `CacheRefused` if another server is registered."""
        state = self.registration.state.last
        server, known = self._known
        if server == connection.server and known is state:
            return self._epoch  # nothing has changed since the last command
        state = self.registration.require(connection.server)
        self._epoch = key_epoch(state.database_id, connection.server, state.generation)
        self._known = (connection.server, state)
        return self._epoch

    async def samples(self) -> list[str]:
        await self.open()
        return [""]

    async def close(self) -> None:
        await self.registration.close()
        await end([self._probing] if self._probing is not None else [])
        await self._connections.close()

    def _failed(self) -> None:
        self._failures += 1
        if self.available and self._failures >= TRIP_AFTER:
            self.available = False
            self._metrics.cache_available.set(0)
            log.warning("cache_circuit_opened")
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_answered())

    async def _probe_until_answered(self) -> None:
        while True:
            try:
                connection = await self._connections.get()
                (reply,) = await connection.ask([(b"PING",)])
                if (error := error_in(reply)) is None:
                    break
                raise error
            except CacheUnavailable as error:
                log.debug("cache_probe_failed", error=str(error))
            except Exception:  # a defect must not keep the circuit open
                log.exception("cache_probe_failed")
            await asyncio.sleep(PROBE_EVERY_S)
        self._failures = 0
        self.available = True
        self._metrics.cache_available.set(1)
        log.info("cache_circuit_closed")
