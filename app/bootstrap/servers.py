"""Opens the servers that the settings name: the cache, the queue, the collector of traces and the language model."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from app.errors import SettingsError
from app.features.clock import Clock
from app.generation.generator import Model, TipGenerator
from app.settings import Settings
from app.stores.queue.client import Queue
from app.stores.sql.cache_state import register_server
from app.stores.sql.database import Database
from app.stores.valkey.cache import NullCache, ValkeyCache
from app.stores.valkey.registration import ServerRegistration
from app.telemetry import Metrics, logger

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

# The role of a long-running process, by its `door`: see `open_service`. Such a process announces the registry that it
# serves, and may send traces. A command does neither.
ROLES = {"http": "api", "queue": "worker"}
Port = TypeVar("Port")
log = logger("bootstrap")


class Wrap(Protocol):
    """Wraps a port so that each call has a span, named after `name`. Without traces, returns the port itself."""

    def __call__(
        self, name: str, port: Port, shared_by: Mapping[str, Callable[..., Iterable[str | None]]] = ..., /
    ) -> Port: ...


def untraced(_: str, port: Port, *__: object) -> Port:
    return port


def open_tracing(settings: Settings, door: str) -> Tracing | None:
    """Begin to send traces, if the settings name a collector; one-off commands (`door` is `command`) send none. Raises
    `SettingsError` if the packages of OpenTelemetry are not installed."""
    if settings.traces_url is None or door not in ROLES:
        return None
    try:
        from app.telemetry.tracing import Tracing  # noqa: PLC0415  # optional, and not imported unless it is on
    except ModuleNotFoundError as error:
        hint = "needs OpenTelemetry, which is not installed; run `pip install 'profiles[otel]'`"
        raise SettingsError("PROFILES_TRACES_URL", hint) from error
    return Tracing(settings.traces_url, ROLES[door])


def open_queue(settings: Settings, metrics: Metrics) -> Queue | None:
    """Open the queue, if the settings name one. An invalid URL raises `SettingsError`."""
    try:
        return Queue(settings.queue_url, metrics, settings.queue_name) if settings.queue_url is not None else None
    except ValueError as error:
        raise SettingsError("PROFILES_QUEUE_URL", str(error)) from error


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
            registration=ServerRegistration(database.state, partial(register_server, database), clock),
            timeout_ms=settings.cache_timeout_ms,
            lease_ms=settings.lease_ms,
            clock=clock,
            metrics=metrics,
        )
    except ValueError as error:
        raise SettingsError("PROFILES_CACHE_URL", str(error)) from error
    try:
        await cache.open()
        yield cache
    finally:
        await cache.close()


@asynccontextmanager
async def open_tip_generator(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[TipGenerator]:
    """Open the generator of tips. It uses a language model if the settings name one, and templates otherwise."""
    if settings.model_url is None or settings.model is None:
        yield TipGenerator(None, clock, metrics)
        return
    # Imported here because most services have no model, and httpx takes a seventh of the start.
    from app.stores.llm import LlmWriter  # noqa: PLC0415

    writer = LlmWriter(settings.model_url, settings.model, clock, lambda: secrets.token_hex(8), key=settings.model_key)
    try:
        log.info("model_set", url=settings.model_url, model=settings.model)
        yield TipGenerator(Model(writer.write, settings.model, settings.model_calls), clock, metrics)
    finally:
        await writer.close()
