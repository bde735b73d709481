"""Faults built into the service on purpose, each by one change of the protocol; and hesitations between its steps.

They change classes of the process they are called in, so only `tests.torture.launcher` may call them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from app.events.ingest import Ingestor
from app.features.events import KNOWN_SUBJECTS, subject_of
from app.profiles.online.fill import Filler, Filling
from app.profiles.online.invalidation import Invalidator
from app.profiles.online.local_cache import LocalCache
from app.profiles.online.trust import TrustGate
from app.profiles.ports import Epoch, Fill
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.source import SqliteSource
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.connections import Connections, Use
from app.stores.valkey.pipelined_connection import Command


def hesitate(random: Random, probability: float, seconds: float) -> None:
    """Between token and snapshot, snapshot and fill, commit and DEL, look and MGET."""

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

    around(SqliteSource, "compute")
    around(SqliteEventLog, "append")
    for name in ("read_rows", "lease", "fill", "drop"):
        around(ValkeyCache, name)


def plain_set() -> None:
    """A fill does not compare: it sets whatever the key holds."""

    async def fill(self: ValkeyCache, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        commands: list[Command] = [(b"SET", key(epoch, item.cell), item.value, b"PX", item.ttl_ms) for item in fills]
        await self._send("fill", Use.BACK, lambda _: commands, epoch)
        return [True] * len(fills)

    _replace(ValkeyCache, "fill", fill)


class _Done:
    """An invalidator for whom everything is done."""

    async def invalidate(self, stale: object) -> bool:
        return True


def del_before_commit() -> None:
    """The keys are deleted before the events are committed, and not after."""
    original: Any = Ingestor._commit

    async def commit(self: Any, group: Any) -> Any:
        features = await self._log.stale_features(KNOWN_SUBJECTS)
        stale: dict[str, frozenset[str]] = {}
        for events in group:
            for item in events:
                user_id = item.event.user_id
                stale[user_id] = stale.get(user_id, frozenset()) | features[subject_of(item.event)]
        if not isinstance(self._invalidator, _Done):
            self._real, self._invalidator = self._invalidator, _Done()
        await self._real.invalidate(stale)
        return await original(self, group)

    _replace(Ingestor, "_commit", commit)


def late_token() -> None:
    """The token is taken after the snapshot, just before the fill."""
    original: Any = Filler.store

    async def store(self: Any, epoch: Epoch, fillings: Sequence[Filling]) -> list[bool]:
        cells = [self.cell(filling.user_id, filling.feature) for filling in fillings]
        tokens = await self._cache.lease(epoch, cells)
        fresh = [filling._replace(token=token) for filling, token in zip(fillings, tokens, strict=True)]
        result: list[bool] = await original(self, epoch, fresh)
        return result

    _replace(Filler, "store", store)


def constant_epoch() -> None:
    """Every server, and every start of one, is taken for the same."""
    _replace(Connections, "epoch", lambda self, lane: "forever")


def open_gate() -> None:
    """Hits are served whatever is owed."""
    _replace(TrustGate, "holds", lambda self: True)


def no_hold_back() -> None:
    """An answer that could not invalidate does not wait until every older look has expired."""

    async def hold_back(self: Any) -> None:
        self.wake()

    _replace(Invalidator, "_hold_back", hold_back)


def near_blind() -> None:
    """What is kept near is believed without a look at the log."""
    _replace(LocalCache, "_look", lambda self: True)


def _replace(owner: type, name: str, mutated: Callable[..., Any]) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: the mutant would change nothing"
    setattr(owner, name, mutated)


MUTANTS: dict[str, Callable[[], None]] = {
    "plain_set": plain_set,
    "del_before_commit": del_before_commit,
    "late_token": late_token,
    "constant_epoch": constant_epoch,
    "open_gate": open_gate,
    "no_hold_back": no_hold_back,
    "near_blind": near_blind,
}
