"""Faults that are built into the service to prove that the run finds them, and random pauses between its steps.

They change classes of the process, so only `tests.torture.launcher` may call them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from random import Random
from types import ModuleType
from typing import Any

from app.events.ingest import Ingestor
from app.events.ports import Appended
from app.features.clock import DAY_MS
from app.features.events import subject_of
from app.profiles.online import cache_protocol, local_cache
from app.profiles.online.cache_protocol import FeatureValue, Filler, TrustGate
from app.profiles.online.invalidation import Invalidator
from app.profiles.online.local_cache import LocalCache
from app.profiles.ports import END_OF_TIME_MS, Epoch, Fill
from app.stores.postgres.connection import connect
from app.stores.postgres.event_log import PostgresEventLog
from app.stores.postgres.features import PostgresSource
from app.stores.postgres.pool import Pool, PooledConnection
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource
from app.stores.valkey import cluster, registration
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.connections import Command
from app.stores.valkey.single_server import SingleServer


def hesitate(random: Random, probability: float, seconds: float) -> None:
    """Pause between token and snapshot, snapshot and fill, commit and DEL, trust check and MGET."""

    async def pause() -> None:
        if random.random() < probability:
            await asyncio.sleep(random.random() * seconds)

    def around(owner: type, name: str) -> None:
        original: Any = getattr(owner, name)

        async def slowly(*arguments: Any, **named: Any) -> Any:
            await pause()
            result = await original(*arguments, **named)
            await pause()
            return result

        setattr(owner, name, slowly)

    for source in (SqliteSource, PostgresSource):
        around(source, "compute")
    for event_log in (SqliteEventLog, PostgresEventLog):
        around(event_log, "append")
    for name in ("read_rows", "lease", "fill", "drop"):
        around(ValkeyCache, name)


def plain_set() -> None:
    """A fill sets the key without comparing it with the token."""

    async def fill(self: ValkeyCache, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        commands: list[Command] = [(b"SET", key(epoch, item.cell), item.value, b"PX", item.ttl_ms) for item in fills]
        users = [item.cell.user_id for item in fills]
        await self._send("fill", "back", users, lambda *_: commands, epoch)
        return [True] * len(fills)

    _replace(ValkeyCache, "fill", fill)


class _NoInvalidator:
    async def invalidate(self, stale: object) -> bool:
        return True


def del_before_commit() -> None:
    """The keys are deleted before the commit, and not after it."""
    original: Any = Ingestor._commit

    async def commit(self: Any, group: Any) -> Any:
        features = await self.log.stale_features()
        stale: dict[str, frozenset[str]] = {}
        for events in group:
            for item in events:
                user_id = item.event.user_id
                stale[user_id] = stale.get(user_id, frozenset()) | features[subject_of(item.event)]
        if not isinstance(self.invalidator, _NoInvalidator):
            self.real, self.invalidator = self.invalidator, _NoInvalidator()
        await self.real.invalidate(stale)
        return await original(self, group)

    _replace(Ingestor, "_commit", commit)


def late_token() -> None:
    """The token is taken after the snapshot, just before the fill."""
    original: Any = Filler.store

    async def store(self: Any, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        tokens = await self.cache.lease(epoch, [fill.cell for fill in fills])
        fresh = [fill._replace(token=token) for fill, token in zip(fills, tokens, strict=True)]
        result: list[bool] = await original(self, epoch, fresh)
        return result

    _replace(Filler, "store", store)


def constant_epoch() -> None:
    """All cache servers have the same epoch, also after a restart."""
    _replace(SingleServer, "epoch", lambda self, connection: "forever")


def open_gate() -> None:
    """Hits are served while invalidations are owed."""
    _replace(TrustGate, "check", lambda self: frozenset())


def no_hold_back() -> None:
    """An answer with an owed invalidation does not wait until earlier trust checks have expired."""

    async def hold_back(self: Any) -> None:
        self.wake.set()

    _replace(Invalidator, "_hold_back", hold_back)


def local_cache_unchecked() -> None:
    """The local cache is served without a check of the change feed."""
    _replace(LocalCache, "_check", lambda self: True)


def expiry_by_ttl() -> None:
    """A value expires when its TTL is over, and not when an event leaves the window."""
    _replace(SqliteSource, "_leaves_ms", lambda self, _: [END_OF_TIME_MS] * len(self._windows))


def future_unnoticed() -> None:
    """A value is a hit however far ahead the clock was by which it was computed."""
    for owner in (cache_protocol, local_cache):
        _replace(owner, "CLOCK_SKEW_MS", 100 * DAY_MS)


def versions_ignored() -> None:
    """The version of a value does not show that an event has made it stale."""
    _replace(FeatureValue, "is_stale", lambda self, newest_event: False)


def answer_before_commit() -> None:
    """Events are acknowledged half a second before their commit."""
    original: Any = Ingestor._commit
    late: set[asyncio.Task[None]] = set()

    async def commit(self: Any, group: Any) -> Any:
        async def commit_late() -> None:
            await asyncio.sleep(0.5)
            await original(self, group)

        task = asyncio.create_task(commit_late())
        late.add(task)
        task.add_done_callback(late.discard)
        invalidated = asyncio.get_running_loop().create_future()
        invalidated.set_result(True)
        return [(Appended(len(events), 0, (), {}), invalidated) for events in group]

    _replace(Ingestor, "_commit", commit)


def standby_read() -> None:
    """Features are computed on the standby, which may not have replayed an acknowledged event yet."""
    create: Any = PostgresSource.__init__
    open_primary: Any = PooledConnection._open

    def __init__(self: Any, database: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807
        create(self, database, *arguments, **named)
        self._readers = Pool(f"{database.url}?target_session_attrs=prefer-standby", 4, database.state)

    def _open(self: Any) -> Any:
        if "prefer-standby" not in self._pool.url:
            return open_primary(self)
        self.connection = connect(self._pool.url)
        self.connection.server = self._pool.observer.last.database_id
        return self.connection

    _replace(PostgresSource, "__init__", __init__)
    _replace(PooledConnection, "_open", _open)


def one_generation() -> None:
    """The keys of a cluster do not depend on which master owns their slot."""
    original: Any = registration.owners

    @lru_cache(maxsize=16)
    def owners(epoch: Epoch) -> Any:
        database_id = epoch.partition("|")[0].encode().hex()
        return [owner and replace(owner, epoch=database_id) for owner in original(epoch)]

    for module in (registration, cluster):
        _replace(module, "owners", owners)


def leak() -> None:
    """Each statement leaves 100 kB behind."""
    original: Any = SqliteSource.compute
    kept: list[bytes] = []

    async def compute(self: Any, *arguments: Any) -> Any:
        kept.append(b"x" * 100_000)
        return await original(self, *arguments)

    _replace(SqliteSource, "compute", compute)


def _replace(owner: type | ModuleType, name: str, mutated: object) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: the mutant would change nothing"
    setattr(owner, name, mutated)


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        plain_set,
        del_before_commit,
        late_token,
        constant_epoch,
        open_gate,
        no_hold_back,
        local_cache_unchecked,
        expiry_by_ttl,
        future_unnoticed,
        versions_ignored,
        answer_before_commit,
        standby_read,
        one_generation,
        leak,
    )
}
