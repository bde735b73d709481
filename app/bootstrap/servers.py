"""Opens the servers that the settings name: the cache and the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.errors import SettingsError
from app.features.clock import Clock
from app.settings import Settings
from app.stores.queue.client import Queue
from app.stores.sql.database import Database
from app.stores.sql.owed_invalidations import SqlRegistrationRepository
from app.stores.valkey.cache import ValkeyCache
from app.stores.valkey.null_cache import NullCache
from app.stores.valkey.server_registration import ServerRegistration
from app.telemetry import Metrics


@asynccontextmanager
async def open_queue(settings: Settings, metrics: Metrics) -> AsyncIterator[Queue | None]:
    """Open the queue, or yield None if the settings name none. An invalid URL raises `SettingsError`."""
    if settings.queue_url is None:
        yield None
        return
    try:
        queue = Queue(settings.queue_url, metrics, settings.queue_name)
    except ValueError as error:
        raise SettingsError("PROFILES_QUEUE_URL", str(error)) from error
    try:
        yield queue
    finally:
        await queue.close()


@asynccontextmanager
async def open_cache(
    settings: Settings, database: Database, clock: Clock, metrics: Metrics
) -> AsyncIterator[ValkeyCache | NullCache]:
    """Open the cache, or yield a `NullCache` if the settings name none. An invalid URL raises `SettingsError`."""
    if settings.cache_url is None:
        yield NullCache()
        return
    try:
        cache = ValkeyCache(
            url=settings.cache_url,
            database_id=database.id,
            timeout_ms=settings.cache_timeout_ms,
            lease_ms=settings.lease_ms,
            clock=clock,
            metrics=metrics,
            registration=ServerRegistration(SqlRegistrationRepository(database), clock),
        )
    except ValueError as error:
        raise SettingsError("PROFILES_CACHE_URL", str(error)) from error
    try:
        await cache.open()
        yield cache
    finally:
        await cache.close()
