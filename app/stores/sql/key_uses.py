"""Stores when each API key was used last, so that unused keys can be found."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from app.stores.sql.database import Connection, SqlRepository

UPSERT_USE = """
INSERT INTO service (name, value) VALUES ('key used ' || ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
SELECT_USES = "SELECT SUBSTR(name, 10), value FROM service WHERE name LIKE 'key used %'"


class SqlKeyUses(SqlRepository):
    """The time at which each API key was used last. Every method raises `StoreUnavailable`."""

    async def note(self, names: Collection[str], now_ms: int) -> None:
        """Store that the keys of these names are in use now."""

        def work(connection: Connection) -> None:
            for name in sorted(names):  # two processes that note the same keys must not wait for each other
                connection.execute(UPSERT_USE, (name, str(now_ms)))

        if names:
            await self._database.write(work, of=())

    async def newest_ms(self) -> Mapping[str, int]:
        """The time of the last use in epoch milliseconds, by the name of the key."""
        return {name: int(value) for name, value in await self._database.rows(SELECT_USES)}
