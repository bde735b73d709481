"""The cache of profile features on Redis or Valkey ≥ 7.0.

A *cell* is one feature of one user. Its key is `pf:<epoch>:{<user>}:<feature>`, with the user id percent-encoded; the
braces are a Cluster hash tag. The epoch identifies database and server: see `app.stores.valkey.connections`. A command
is sent only on a connection that has the epoch in the command's keys. A fill, which stores a computed value, is a
compare-and-set: `SET … IFEQ` if the server knows this option, otherwise a Lua script.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote

from hiredis import ReplyError

from app.errors import CacheRefused, CacheUnavailable
from app.features.clock import Clock
from app.profiles.online.cache_protocol import LEASE
from app.profiles.ports import Cell, Epoch, Fill, Row
from app.stores.valkey.breaker import CircuitBreaker
from app.stores.valkey.connections import Connections, Use
from app.stores.valkey.pipelined_connection import Command
from app.stores.valkey.server_registration import ServerRegistration
from app.telemetry import Metrics, logger

_SAFE_IN_KEY = "-._~@:"
_PLAIN = re.compile(r"[A-Za-z0-9\-._~@:]*").fullmatch
_SYNTAX_ERROR = "ERR syntax error"
_WRONG_TYPE = "WRONGTYPE"
_NO_SCRIPT = "NOSCRIPT"
NONCE_BYTES = 12
_KEYS_PER_DEL = 512
_KEYS_PER_SCAN = 1_000
log = logger("stores.valkey")


class _Script(NamedTuple):
    """A Lua script and its SHA-1 digest. Scripts are called by digest, and loaded if the server lacks them."""

    text: bytes
    digest: str

    @classmethod
    def of(cls, text: bytes) -> _Script:
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


SET_IF_EQUAL = _Script.of(b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    return 1
end
return 0
""")
DELETE_IF_EQUAL = _Script.of(b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
""")


def key(epoch: Epoch, cell: Cell) -> bytes:
    """The key of one feature of one user: `pf:<epoch>:{<user>}:<feature>`."""
    return _head(epoch, cell.user_id) + cell.feature.encode()


def mget(epoch: Epoch, rows: Sequence[Row]) -> bytes:
    """An MGET of all features in `rows`, packed for sending. User ids are inserted into templates of packed keys, which
    takes half as long as making and packing each key."""
    arguments = 1
    parts: list[bytes] = []
    for user_id, features in rows:
        user = _quoted(user_id).encode()
        parts.append(_keys_template(epoch, tuple(features), len(user)) % ((user,) * len(features)))
        arguments += len(features)
    return b"*%d\r\n$4\r\nMGET\r\n%b" % (arguments, b"".join(parts))


@lru_cache(maxsize=1_024)
def _keys_template(epoch: Epoch, features: Sequence[bytes], user_bytes: int) -> bytes:
    """The keys of one user's features as arguments of a command, with a `%b` in the place of each user."""
    keys = [b"pf:%b:{%%b}:%b" % (epoch.encode(), feature) for feature in features]
    return b"".join([b"$%d\r\n%b\r\n" % (len(key) - len(b"%b") + user_bytes, key) for key in keys])


def _head(epoch: Epoch, user_id: str) -> bytes:
    return f"pf:{epoch}:{{{_quoted(user_id)}}}:".encode()


def _quoted(user_id: str) -> str:
    return user_id if _PLAIN(user_id) else quote(user_id, safe=_SAFE_IN_KEY)


def _checked(replies: list[Any], allowed: tuple[str, ...] = ()) -> list[Any]:
    """Return `replies`, or raise for the first error reply whose text does not begin with one of `allowed`."""
    for reply in replies:
        if isinstance(reply, ReplyError):
            text = str(reply)
            if text.startswith(allowed):
                continue
            if text.startswith(("LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "TRYAGAIN")):
                raise CacheUnavailable(text)
            raise CacheRefused(text)
    return replies


def _nonces() -> Callable[[], bytes]:
    """A function that returns a new nonce at each call, unique among all processes: a random start and a counter."""
    start, numbers = secrets.token_bytes(NONCE_BYTES), itertools.count()
    return lambda: b"%b.%x" % (start, next(numbers))


class ValkeyCache:
    """The cache of profile features on one server. Implements `app.profiles.ports.Cache`."""

    def __init__(
        self,
        *,
        url: str,
        database_id: str,
        timeout_ms: int,
        lease_ms: int,
        clock: Clock,
        metrics: Metrics,
        registration: ServerRegistration | None = None,
        nonce: Callable[[], bytes] | None = None,
    ) -> None:
        """`timeout_ms` limits each command; `lease_ms` is the time to live of a lease, the marker of a computation.
        Without a `registration`, any server is accepted as the cache. Raises `ValueError` for an invalid URL."""
        self._registration = registration
        self._connections = Connections(url, database_id, timeout_ms / 1000, registration)
        self._lease_ms = lease_ms
        self._nonce = nonce or _nonces()
        self._clock = clock
        self._metrics = metrics
        self._breaker = CircuitBreaker(self.ping, metrics)
        self._without_ifeq: Epoch | None = None

    @property
    def available(self) -> bool:
        return self._breaker.closed

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        return await self.read_rows([(cell.user_id, (cell.feature.encode(),)) for cell in cells])

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """Read all features of all users in `rows` with one MGET. Return the epoch and the content of each key."""
        epoch, (held,) = await self._send("read", Use.FRONT, lambda epoch: [mget(epoch, rows)])
        return epoch, held

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """Put a new lease under each empty key, with a pipelined `SET … NX GET`. Return the contents of each key.

        A lease marks that a value is being computed. A key that is not a string is deleted: another program wrote it,
        and the cache could never use it.
        """
        if not cells:
            return []
        leases = [LEASE + self._nonce() for _ in cells]
        commands: list[Command] = [
            (b"SET", key(epoch, cell), lease, b"NX", b"GET", b"PX", self._lease_ms)
            for cell, lease in zip(cells, leases, strict=True)
        ]
        _, previous = await self._send("lease", Use.FRONT, lambda _: commands, epoch, (_WRONG_TYPE,))
        foreign = [cell for cell, held in zip(cells, previous, strict=True) if isinstance(held, ReplyError)]
        if foreign:
            log.warning("foreign_keys_deleted", keys=[key(epoch, cell).decode() for cell in foreign[:3]])
            await self.drop(foreign)
            previous = [None if isinstance(held, ReplyError) else held for held in previous]
        return [held or lease for held, lease in zip(previous, leases, strict=True)]

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        if self._without_ifeq != epoch:
            commands: list[Command] = [
                (b"SET", key(epoch, fill.cell), fill.value, b"IFEQ", fill.token, b"PX", fill.ttl_ms) for fill in fills
            ]
            _, replies = await self._send("fill", Use.BACK, lambda _: commands, epoch, (_SYNTAX_ERROR,))
            if not isinstance(replies[0], ReplyError):
                return [reply is not None for reply in replies]
            self._without_ifeq = epoch
        calls = [(key(epoch, fill.cell), fill.token, fill.value, fill.ttl_ms) for fill in fills]
        return [reply == 1 for reply in await self._run_script("fill", SET_IF_EQUAL, calls, epoch)]

    async def drop(self, cells: Collection[Cell]) -> None:
        """Delete the keys of these cells. The epoch in the keys is that of the connection that sends the DEL.

        Return only after the server has confirmed it and no process can still be reading from a server registered
        earlier."""
        if not cells:
            return
        if self._registration is not None:
            await self._registration.refresh()  # after the commit that made the values stale

        def deletions(epoch: Epoch) -> list[Command]:
            keys = [key(epoch, cell) for cell in cells]
            return [(b"DEL", *keys[start : start + _KEYS_PER_DEL]) for start in range(0, len(keys), _KEYS_PER_DEL)]

        await self._send("del", Use.FRONT, deletions)
        if self._registration is not None:
            await self._registration.settle()

    async def drop_user(self, user_id: str) -> None:
        command: Command = (b"SCAN", b"0", b"MATCH", _head("*", user_id) + b"*", b"COUNT", _KEYS_PER_SCAN)
        while True:
            cursor, keys = await self._one("scan", command)
            if keys:
                await self._one("del", (b"DEL", *keys))
            if cursor == b"0":
                return
            command = (b"SCAN", cursor, *command[2:])

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        calls = [(key(epoch, cell), value) for cell, value in held]
        return sum(await self._run_script("drop_exactly", DELETE_IF_EQUAL, calls, epoch))

    async def open(self) -> None:
        """Connect and register the server, so that the first read can use it. Do nothing if no server answers."""
        with suppress(CacheUnavailable):
            await self._connections.register()

    async def ping(self) -> None:
        """Send a PING. Raises `CacheUnavailable` if the server does not answer."""
        connection = await self._connections.get()
        _checked(await connection.ask([(b"PING",)]))

    async def check(self) -> None:
        """Run the commands of a read, a lease, a fill and an invalidation on a separate key.

        Raises:
            CacheUnavailable: the server does not answer.
            CacheRefused: the server refuses one of the commands; the message names it and the reason.
        """
        doing = "a read"
        cell = Cell("", f"check-{self._nonce().hex()}")
        try:
            epoch, _ = await self.read([cell])
            doing = "a lease"
            (token,) = await self.lease(epoch, [cell])
            doing = "a fill"
            await self.fill(epoch, [Fill(cell, token, b"check", 1_000)])
            doing = "a deletion"
            await self.drop([cell])
        except CacheRefused as error:
            raise CacheRefused(f"it refuses {doing}: {error}") from error

    async def close(self) -> None:
        await self._breaker.close()
        if self._registration is not None:
            await self._registration.close()
        await self._connections.close()

    async def _send(
        self,
        what: str,
        use: Use,
        commands: Callable[[Epoch], Sequence[Command]],
        epoch: Epoch | None = None,
        allowed: tuple[str, ...] = (),
    ) -> tuple[Epoch, list[Any]]:
        """Send the commands that `commands` builds for the connection's epoch. Return that epoch and the replies. If
        `epoch` is given and the connection has another, raise `CacheRefused` and send nothing. `what` labels the
        duration in the metrics. Error replies that begin with one of `allowed` are returned, all others are raised."""
        started = self._clock.monotonic()
        try:
            connection = await self._connections.get(use)
            # No await from here to `ask`: keys built for this connection must be sent on this connection.
            current = self._connections.epoch(connection)
            if epoch is not None and current != epoch:
                raise CacheRefused("the cache was restarted or replaced during the request")
            replies = _checked(await connection.ask(commands(current)), allowed)
        except CacheUnavailable as error:
            refused = isinstance(error, CacheRefused)
            self._metrics.cache_errors.labels("refused" if refused else "silent").inc()
            if not refused:
                self._breaker.failed()
            raise
        self._breaker.failures = 0
        self._metrics.cache_seconds.labels(what).observe(self._clock.monotonic() - started)
        return current, replies

    async def _one(self, what: str, command: Command) -> Any:
        _, (reply,) = await self._send(what, Use.BACK, lambda _: [command])
        return reply

    async def _run_script(
        self, what: str, script: _Script, calls: Sequence[tuple[bytes | int, ...]], epoch: Epoch
    ) -> list[Any]:
        commands: list[Command] = [(b"EVALSHA", script.digest, 1, *call) for call in calls]
        _, replies = await self._send(what, Use.BACK, lambda _: commands, epoch, (_NO_SCRIPT,))
        lacking = [place for place, reply in enumerate(replies) if isinstance(reply, ReplyError)]
        if lacking:
            again: list[Command] = [(b"SCRIPT", b"LOAD", script.text), *(commands[place] for place in lacking)]
            _, (_, *late) = await self._send(what, Use.BACK, lambda _: again, epoch)
            for place, reply in zip(lacking, late, strict=True):
                replies[place] = reply
        return replies
