"""Stores the feature registries that processes have served, the features that they cache, and disabled features."""

from contextlib import suppress

import msgspec

from app.errors import Conflict, StoreUnavailable
from app.features.plan import Announced, definitions_of
from app.features.registry import Definition, Registry
from app.stores.sql.database import Connection, Database, SqlRepository

SELECT_FEATURE_KEYS = "SELECT subject, feature FROM feature_keys"
INSERT_FEATURE_KEY = (
    "INSERT INTO feature_keys (subject, feature, announced_at_ms) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
)
UPSERT_REGISTRY = """
INSERT INTO registries (fingerprint, definitions, first_seen_ms, last_seen_ms) VALUES (:fingerprint, :body, :now, :now)
ON CONFLICT (fingerprint) DO UPDATE SET definitions = excluded.definitions, last_seen_ms = excluded.last_seen_ms
"""
UPDATE_SEEN = "UPDATE registries SET last_seen_ms = :now WHERE fingerprint = :fingerprint AND last_seen_ms < :now"
SELECT_REGISTRIES = "SELECT fingerprint, definitions, first_seen_ms, last_seen_ms FROM registries ORDER BY last_seen_ms"
INSERT_DISABLED = """
INSERT INTO disabled_features (feature, disabled_by, reason, disabled_at_ms) VALUES (?, ?, ?, ?)
ON CONFLICT (feature) DO NOTHING
"""
DELETE_DISABLED = "DELETE FROM disabled_features WHERE feature = ?"
_decode = msgspec.json.Decoder(tuple[Definition, ...]).decode


async def announce(database: Database, registry: Registry, now_ms: int) -> None:
    """Record the names of the features that this process will cache. Call it before the process caches values. Ingest
    deletes the cache keys of every recorded feature. If it deleted only those of its own registry, a process of the old
    release would, during a deploy, leave the keys of a feature that only the new release knows. If no name is new,
    nothing is written, so that a process can start on a full disk or a locked database. Raises `StoreUnavailable`."""
    known = set(await database.rows(SELECT_FEATURE_KEYS))
    pairs = [(subject, entry.name) for entry in registry for subject in entry.invalidated_by]
    rows = [(*pair, now_ms) for pair in pairs if pair not in known]

    def work(connection: Connection) -> None:
        for statement in database.announce_lock:
            connection.execute(statement)
        connection.executemany(INSERT_FEATURE_KEY, rows)

    if rows:
        await database.write(work, of=())


class SqlRegistries(SqlRepository):
    """The registries that processes have served, and the disabled features."""

    async def announce(self, registry: Registry, now_ms: int) -> None:
        """Record that a process serves this registry. Write nothing if it is known: the disk may be full."""
        definitions = definitions_of(registry)
        if any(known.definitions == definitions for known in await self.announced()):
            return
        row = {"fingerprint": registry.fingerprint, "body": msgspec.json.encode(definitions).decode(), "now": now_ms}
        await self._database.execute(UPSERT_REGISTRY, row)

    async def announced(self) -> list[Announced]:
        rows = await self._database.rows(SELECT_REGISTRIES)
        return [Announced(fingerprint, _decode(body), first, last) for fingerprint, body, first, last in rows]

    async def switch(self, feature: str, actor: str, reason: str, now_ms: int, *, on: bool) -> str:
        statement, row = (DELETE_DISABLED, (feature,)) if on else (INSERT_DISABLED, (feature, actor, reason, now_ms))
        outcome = "enabled" if on else "disabled"
        if not await self._database.execute(statement, row):
            raise Conflict(f"{feature} is {outcome} already")
        with suppress(StoreUnavailable):  # the change is stored; the next query will show it
            await self._database.state.query()  # this process sees it at once, others within a second
        return outcome + (f": {reason}" if reason else "")
