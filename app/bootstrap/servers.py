"""The servers that settings name: cache and queue, each where it is named."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

from app.errors import SettingsError
from app.features.clock import Clock
from app.settings import Settings
from app.stores.queue.client import Queue
from app.stores.sqlite.database import Database
from app.stores.sqlite.owed_invalidations import SqliteOwedInvalidations
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.null_cache import NullCache
from app.stores.valkey.server_registration import ServerRegistration
from app.telemetry import Metrics

NONCE_BYTES = 12


def named_queue(settings: Settings, metrics: Metrics) -> Queue | None:
    """The queue, where one is named. Raises `SettingsError`."""
    if settings.queue_url is None:
        return None
    try:
        return Queue(settings.queue_url, metrics, settings.queue_name)
    except ValueError as error:
        raise SettingsError("PROFILES_QUEUE_URL", str(error)) from error


def nonces() -> Callable[[], bytes]:
    """Draws nonces that no other process draws, and that this one draws once: a random start, and a number."""
    start, numbers = secrets.token_bytes(NONCE_BYTES), itertools.count()
    return lambda: b"%b.%x" % (start, next(numbers))


def named_cache(
    settings: Settings, database: Database, owed: SqliteOwedInvalidations, clock: Clock, metrics: Metrics
) -> ValkeyCache | NullCache:
    """The cache, or none. Raises `SettingsError`."""
    if settings.cache_url is None:
        return NullCache()
    try:
        return ValkeyCache(
            url=settings.cache_url,
            database_id=database.id,
            timeout_ms=settings.cache_timeout_ms,
            lease_ms=settings.lease_ms,
            nonce=nonces(),
            clock=clock,
            metrics=metrics,
            registration=ServerRegistration(owed.registration, clock),
        )
    except ValueError as error:
        raise SettingsError("PROFILES_CACHE_URL", str(error)) from error
