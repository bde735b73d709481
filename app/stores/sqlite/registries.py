"""Which registries processes serve or have served, and which features are disabled."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress

import msgspec

from app.errors import Conflict, StoreUnavailable
from app.features.plan import Announced, Definition, definitions_of
from app.features.registry import Registry
from app.stores.sqlite.database import Database

UPSERT_REGISTRY = """
INSERT INTO registries (fingerprint, definitions, first_seen_ms, last_seen_ms) VALUES (:fingerprint, :body, :now, :now)
ON CONFLICT (fingerprint) DO UPDATE SET definitions = excluded.definitions, last_seen_ms = excluded.last_seen_ms
"""
UPDATE_SEEN = "UPDATE registries SET last_seen_ms = MAX(last_seen_ms, ?) WHERE fingerprint = ?"
SELECT_REGISTRIES = "SELECT fingerprint, definitions, first_seen_ms, last_seen_ms FROM registries ORDER BY last_seen_ms"
INSERT_DISABLED = """
INSERT INTO disabled_features (feature, disabled_by, reason, disabled_at_ms) VALUES (?, ?, ?, ?)
ON CONFLICT (feature) DO NOTHING
"""
DELETE_DISABLED = "DELETE FROM disabled_features WHERE feature = ?"
_decode = msgspec.json.Decoder(tuple[Definition, ...]).decode


class SqliteRegistries:
    """What processes tell each other about features. All methods raise `StoreUnavailable`."""

    def __init__(self, database: Database, look: Callable[[], object] = lambda: None) -> None:
        """`look` lets this process see at once what it has switched; the others see it within a second."""
        self._database = database
        self._look = look

    async def announce(self, registry: Registry, now_ms: int) -> None:
        """Record that a process serves this registry.

        Nothing is written if that is known, so that a process can start while the disk is full.
        """
        definitions = definitions_of(registry)
        if any(known.definitions == definitions for known in await self.announced()):
            return
        body = msgspec.json.encode(definitions).decode()
        parameters = {"fingerprint": registry.fingerprint, "body": body, "now": now_ms}
        await self._database.write(lambda connection: connection.execute(UPSERT_REGISTRY, parameters))

    async def announced(self) -> list[Announced]:
        """Every registry that was ever served, the one that was seen last at the end."""

        def work(connection: sqlite3.Connection) -> list[Announced]:
            rows = connection.execute(SELECT_REGISTRIES).fetchall()
            return [Announced(fingerprint, _decode(body), first, last) for fingerprint, body, first, last in rows]

        return await self._database.read(work)

    async def switch(self, feature: str, actor: str, reason: str, now_ms: int, *, on: bool) -> str:
        """Enable or disable a feature; what was done, for the audit trail.

        Raises:
            Conflict: it is enabled, or disabled, already.
        """
        changed = await (self._enable(feature) if on else self._disable(feature, actor, reason, now_ms))
        if not changed:
            raise Conflict(f"{feature} is {'enabled' if on else 'disabled'} already")
        with suppress(StoreUnavailable):  # it is done, and the next look will tell
            self._look()
        return ("enabled" if on else "disabled") + (f": {reason}" if reason else "")

    async def _disable(self, feature: str, disabled_by: str, reason: str, now_ms: int) -> bool:
        row = (feature, disabled_by, reason, now_ms)
        return await self._database.write(lambda connection: connection.execute(INSERT_DISABLED, row).rowcount == 1)

    async def _enable(self, feature: str) -> bool:
        return await self._database.write(
            lambda connection: connection.execute(DELETE_DISABLED, (feature,)).rowcount == 1
        )
