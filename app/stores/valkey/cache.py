"""The cache of profile features on Redis or Valkey ≥ 7.0.

A *cell* is one feature of one user. Its key is `pf:<epoch>:{<user>}:<feature>`, with the user id percent-encoded; the
braces are a Cluster hash tag. The epoch identifies the database and the server; in a cluster, the server is the owner
of the slot (`app.stores.valkey.registration`). A command is sent only on a connection whose epoch is that of the
command's keys. A fill, which stores a computed value, is a compare-and-set: `SET … IFEQ`, or a Lua script if the server
lacks this option.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn

from hiredis import ReplyError

from app.errors import CacheRefused, CacheUnavailable
from app.features.clock import Clock
from app.features.ids import quoted_in_key
from app.profiles.online.cache_protocol import LEASE
from app.profiles.ports import UNAVAILABLE, Cell, Epoch, Fill, Row
from app.stores.valkey.cluster import Cluster
from app.stores.valkey.connections import Command, Commands, Use
from app.stores.valkey.pool import is_cluster
from app.stores.valkey.registration import ServerRegistration
from app.stores.valkey.single_server import SingleServer
from app.telemetry import Metrics, logger

_USER = b"\0"  # stands for a user id, and can be part of none
_KEYS_PER_DEL = 512
log = logger("stores.valkey")
# Runs a command (ARGV[2]) and its arguments on the key, if the key holds ARGV[1].
IF_EQUAL = b"""
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call(ARGV[2], KEYS[1], unpack(ARGV, 3))
    return 1
end
return 0
"""


def key(epoch: Epoch, cell: Cell) -> bytes:
    return f"pf:{epoch}:{{{quoted_in_key(cell.user_id)}}}:{cell.feature}".encode()


def mget(epoch: Epoch, rows: Sequence[Row]) -> bytes:
    """An MGET of all features in `rows`, packed. Filling templates of keys is ten times as fast as packing each key."""
    arguments, size = 1, -1
    previous: Sequence[bytes] | None = None
    template = b""
    parts: list[bytes] = []
    for user_id, features in rows:
        user = quoted_in_key(user_id).encode()
        if features is not previous or len(user) != size:
            previous, size = features, len(user)
            template = _keys_template(epoch, tuple(features), size)
        parts.append(template.replace(_USER, user))
        arguments += len(features)
    return b"*%d\r\n$4\r\nMGET\r\n%b" % (arguments, b"".join(parts))


def mget_of_user(epoch: Epoch, row: Row) -> bytes:
    """An MGET of one user's features: the same as `mget` of one row, but faster."""
    user = quoted_in_key(row[0]).encode()
    return _mget_template(epoch, tuple(row[1]), len(user)).replace(_USER, user)


@lru_cache(maxsize=1_024)
def _mget_template(epoch: Epoch, features: Sequence[bytes], user_bytes: int) -> bytes:
    return b"*%d\r\n$4\r\nMGET\r\n" % (len(features) + 1) + _keys_template(epoch, features, user_bytes)


@lru_cache(maxsize=1_024)
def _keys_template(epoch: Epoch, features: Sequence[bytes], user_bytes: int) -> bytes:
    """The keys of one user's features as packed arguments, with `_USER` in place of an id of `user_bytes` bytes."""
    keys = [b"pf:%b:{%b}:%b" % (epoch.encode(), _USER, feature) for feature in features]
    return b"".join([b"$%d\r\n%b\r\n" % (len(key) - len(_USER) + user_bytes, key) for key in keys])


class ValkeyCache:
    """The cache of profile features on one server or a cluster. Implements `app.profiles.ports.Cache`."""

    def __init__(
        self,
        *,
        url: str,
        registration: ServerRegistration,
        timeout_ms: int,
        lease_ms: int,
        clock: Clock,
        metrics: Metrics,
        nonce: Callable[[], bytes] | None = None,
    ) -> None:
        """`timeout_ms` limits each command; `lease_ms` is the time to live of a lease, the marker of a computation.
        `nonce` returns a new nonce at each call. Raises `ValueError` for an invalid URL."""
        self._lease_ms = lease_ms
        start, numbers = secrets.token_bytes(12), itertools.count()  # together unique among all processes
        self._nonce = nonce or (lambda: b"%b.%x" % (start, next(numbers)))
        self._clock = clock
        self._metrics = metrics
        self._without_ifeq: Epoch | None = None
        kind = Cluster if is_cluster(url) else SingleServer
        self._servers: Cluster | SingleServer = kind(url, timeout_ms / 1000, registration, metrics)

    @property
    def available(self) -> bool:
        return self._servers.available

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        return await self.read_rows([(cell.user_id, (cell.feature.encode(),)) for cell in cells])

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """Read the cells with one MGET; in a cluster, with one MGET for each user."""
        users = [user_id for user_id, _ in rows]
        if isinstance(self._servers, SingleServer):
            epoch, (held,) = await self._send("read", "front", users, lambda epoch, _: [mget(epoch, rows)])
            return epoch, held
        epoch, replies = await self._send(
            "read", "front", users, lambda epoch, at: [mget_of_user(epoch, rows[i]) for i in at]
        )
        held = []
        for (_, features), reply in zip(rows, replies, strict=True):
            held += [UNAVAILABLE] * len(features) if isinstance(reply, CacheUnavailable) else reply
        return epoch, held

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """Put leases with `SET … NX GET`. A key that holds no string is from another program, and is deleted."""
        if not cells:
            return []
        leases = [LEASE + self._nonce() for _ in cells]

        def commands(epoch: str, at: Sequence[int]) -> list[Command]:
            return [(b"SET", key(epoch, cells[i]), leases[i], b"NX", b"GET", b"PX", self._lease_ms) for i in at]

        users = [cell.user_id for cell in cells]
        _, previous = await self._send("lease", "front", users, commands, epoch, ("WRONGTYPE",))
        previous = [UNAVAILABLE if isinstance(held, CacheUnavailable) else held for held in previous]
        foreign = [cell for cell, held in zip(cells, previous, strict=True) if isinstance(held, ReplyError)]
        if foreign:
            log.warning("foreign_keys_deleted", keys=[key(epoch, cell).decode() for cell in foreign[:3]])
            await self.drop(foreign)
            previous = [None if isinstance(held, ReplyError) else held for held in previous]
        return [lease if held is None else held for held, lease in zip(previous, leases, strict=True)]

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        if self._without_ifeq != epoch:

            def commands(epoch: str, at: Sequence[int]) -> list[Command]:
                some = [fills[i] for i in at]
                return [(b"SET", key(epoch, f.cell), f.value, b"IFEQ", f.token, b"PX", f.ttl_ms) for f in some]

            users = [fill.cell.user_id for fill in fills]
            _, replies = await self._send("fill", "back", users, commands, epoch, ("ERR syntax error",))
            if not any(isinstance(reply, ReplyError) for reply in replies):
                return [reply == b"OK" for reply in replies]
            self._without_ifeq = epoch  # a node that has stored a value refuses it the second time: the token is gone
        calls = [(fill.cell, (fill.token, b"SET", fill.value, b"PX", fill.ttl_ms)) for fill in fills]
        return [reply == 1 for reply in await self._if_equal("fill", epoch, calls)]

    async def drop(self, cells: Collection[Cell]) -> None:
        """Delete the cells' keys, with the epoch of the connection that sends the DEL. Return only when no process can
        still be reading from a server that was registered before the present one."""
        if not cells:
            return
        await self._servers.registration.refresh()  # after the commit that made the values stale
        by_user: dict[str, list[Cell]] = {}
        for cell in cells:
            by_user.setdefault(cell.user_id, []).append(cell)
        users, rows = list(by_user), list(by_user.values())

        def deletions(epoch: Epoch, at: Sequence[int]) -> list[Command]:
            if isinstance(self._servers, Cluster):
                return [(b"DEL", *(key(epoch, cell) for cell in rows[i])) for i in at]
            keys = [key(epoch, cell) for cell in cells]
            return [(b"DEL", *keys[start : start + _KEYS_PER_DEL]) for start in range(0, len(keys), _KEYS_PER_DEL)]

        _, replies = await self._send("del", "front", users, deletions, raises=False)
        await self._servers.registration.settle()
        failed = [i for i, reply in enumerate(replies) if isinstance(reply, CacheUnavailable)]
        if failed and isinstance(self._servers, Cluster):  # a single server raises its error
            error: CacheUnavailable = replies[failed[0]]
            error.slots = self._servers.slots_without_answer(users[i] for i in failed)
            raise error

    async def drop_user(self, user_id: str) -> None:
        cursor, pattern = b"0", key("*", Cell(user_id, "*"))
        while True:
            scan = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", 1_000)
            cursor, keys = await self._one("scan", user_id, scan)
            if keys:
                await self._one("del", user_id, (b"DEL", *keys))
            if cursor == b"0":
                return

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        replies = await self._if_equal("drop_exactly", epoch, [(cell, (value, b"DEL")) for cell, value in held])
        for reply in replies:
            if isinstance(reply, CacheUnavailable):
                raise reply
        return sum(replies)

    async def open(self) -> None:
        """Connect and register the server, so that the first read can use it. Do nothing if no server answers."""
        with suppress(CacheUnavailable):
            await self._servers.open()

    async def check(self) -> None:
        """Run the commands of a read, a lease, a fill and an invalidation on a separate key, on each master. Raises
        `CacheUnavailable` if a slot has no owner that answers; `CacheRefused` names the refused command."""
        users = await self._servers.samples()
        found = await asyncio.gather(*map(self._check, users), return_exceptions=True)
        errors = [error for error in found if error is not None]
        for error in errors:
            if len(users) > 1 and isinstance(error, CacheUnavailable) and not isinstance(error, CacheRefused):
                reason = f"{len(errors)} of the cluster's {len(users)} masters cannot be used: {error.public_reason}"
                raise CacheUnavailable(f"{reason} ({error})", reason) from error
            raise error

    async def _check(self, user_id: str) -> None:
        doing = "a read"
        cell = Cell(user_id, f"check-{self._nonce().hex()}")
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
        await self._servers.close()

    async def _send(
        self,
        what: str,
        use: Use,
        user_ids: Sequence[str],
        commands: Commands,
        epoch: Epoch | None = None,
        allowed: tuple[str, ...] = (),
        *,
        raises: bool = True,
    ) -> tuple[Epoch, list[Any]]:
        """Send commands (see `Cluster.send`) and time them. If `raises` and all replies are errors, raise the first."""
        started = self._clock.monotonic()
        proven = what in ("read", "lease")
        current, replies = await self._servers.send(use, user_ids, commands, epoch, allowed, proven=proven)
        self._metrics.cache_seconds.labels(what).observe(self._clock.monotonic() - started)
        if raises and all(isinstance(reply, CacheUnavailable) for reply in replies):
            raise replies[0]
        return current, replies

    async def _one(self, what: str, user_id: str, command: Command) -> Any:
        _, (reply,) = await self._send(what, "back", [user_id], lambda *_: [command])
        return reply

    async def _if_equal(
        self, what: str, epoch: Epoch, calls: Sequence[tuple[Cell, tuple[bytes | int, ...]]]
    ) -> list[Any]:
        """Run a command on each cell that holds an expected value; `IF_EQUAL` is the script. A call is the cell, and a
        tuple of the expected value, the name of the command and its arguments after the key."""

        # With its text each time: the script is shorter than most values, and the server compiles it only once.
        def commands(epoch: str, at: Sequence[int]) -> list[Command]:
            return [(b"EVAL", IF_EQUAL, 1, key(epoch, calls[i][0]), *calls[i][1]) for i in at]

        _, replies = await self._send(what, "back", [cell.user_id for cell, _ in calls], commands, epoch)
        return replies


class NullCache:
    """Replaces the cache in a process without one. Each command raises, so every read uses the database."""

    available = False

    async def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise CacheUnavailable("no cache is set (PROFILES_CACHE_URL)")

    read = read_rows = lease = fill = drop = drop_user = drop_exactly = check = _refuse
