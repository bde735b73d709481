"""Loads the features that the settings name, and opens the database that they name, with the adapters of its engine."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from app.features.contract import Contract, import_registry
from app.features.definitions import REGISTRY
from app.features.registry import Registry
from app.features.schema import ProfileFeatures, check_mirror, mirror_of
from app.profiles.ports import ChangeFeed
from app.settings import Settings
from app.stores.sql.database import Database
from app.stores.sql.event_log import SqlEventLog
from app.stores.sql.source import SqlSource
from app.stores.sqlite.features import SqliteSource, compile_registry
from app.stores.sqlite.features import check_features as check_on_sqlite


def load_contract(settings: Settings, source: str | None = None, *, own_mirror: bool = True) -> Contract:
    """Load and check a feature registry and its mirror, the Struct with one typed field per feature. The SQL of the
    features is compiled on SQLite, whatever the engine.

    The registry is the one at `source`, or else the one that the settings name, or else the built-in one. With
    `own_mirror=False` the mirror is derived from the registry, because the declared mirror may be out of date. Raises
    `RegistryError` if an entry breaks a rule or the mirror differs from the registry. Raises `SettingsError` if the
    registry cannot be loaded, if the retention of events is too short for the longest feature window, or if the
    retention of decisions is too short for the reward window.
    """
    if source is not None:
        registry, mirror = import_registry(source, "--registry")
    elif settings.features is not None:
        registry, mirror = import_registry(settings.features, "PROFILES_FEATURES")
    else:
        registry, mirror = REGISTRY, ProfileFeatures
    compiled = compile_registry(registry)
    if mirror is None or not own_mirror:
        mirror = mirror_of(compiled)
    check_mirror(compiled, mirror)
    settings.require_retention(compiled.longest_window_ms())
    return Contract(compiled, mirror)


class Engine(NamedTuple):
    """A database and the adapters of its engine. `change_feed` makes the feed of changed users that a local cache
    needs; None if the engine has no feed that is cheap enough."""

    database: Database
    event_log: SqlEventLog
    change_feed: Callable[[], ChangeFeed] | None
    check: Callable[[Registry, Any], None]
    source_type: type[SqlSource]
    timeout_s: float

    def source(self, registry: Registry, width: int = 2) -> SqlSource:
        return self.source_type(self.database, registry, width=width, timeout_s=self.timeout_s)

    async def check_features(self, registry: Registry) -> None:
        """Compile the SQL of every entry against the database. Raises `RegistryError`."""
        await self.database.read(lambda connection: self.check(registry, connection))


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open the database, and close it when the block ends. Raises `SchemaMismatch` or `StoreUnavailable`."""
    timeout_s = settings.statement_timeout_ms / 1000
    if isinstance(settings.database, Path):
        from app.stores.sqlite.data_version import SqliteChangeFeed  # noqa: PLC0415  # the other engine is not imported
        from app.stores.sqlite.database import SqliteDatabase  # noqa: PLC0415
        from app.stores.sqlite.event_log import SqliteEventLog  # noqa: PLC0415

        sqlite = await SqliteDatabase.open(settings.database, settings.readers)
        feed = partial(SqliteChangeFeed, sqlite.state)
        engine = Engine(sqlite, SqliteEventLog(sqlite), feed, check_on_sqlite, SqliteSource, timeout_s)
    else:
        from app.stores.postgres.database import PostgresDatabase  # noqa: PLC0415  # psycopg is optional
        from app.stores.postgres.event_log import PostgresEventLog  # noqa: PLC0415
        from app.stores.postgres.features import PostgresSource, check_features  # noqa: PLC0415

        postgres = await PostgresDatabase.open(settings.database.url, settings.readers)
        engine = Engine(postgres, PostgresEventLog(postgres), None, check_features, PostgresSource, timeout_s)
    try:
        yield engine
    finally:
        await engine.database.close()
