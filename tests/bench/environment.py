"""The environment of a measurement: a database, a cache and a queue of its own, removed afterwards."""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import uvloop

from app.bootstrap.service import open_service
from app.cli.demo_set import generate
from app.features.clock import SystemClock
from app.settings import Settings
from app.settings.parsers import postgres_url
from app.stores.migrate import migrate
from app.stores.valkey.embedded import QUEUE_OPTIONS, EmbeddedServer, cache_options
from tests.support.postgres import PostgresServer, servers
from tests.support.registry import FEATURES

USERS = 1_000
DAYS = 60
PER_REQUEST = 1_000
CACHE_MB = 512


class Environment(NamedTuple):
    """`users` are those of the demonstration set; `reference_url` is a cache server for the references."""

    settings: Settings
    reference_url: str
    users: list[str]
    now_ms: int

    @property
    def cache_url(self) -> str:
        return self.settings.cache_url or ""


@contextmanager
def demonstration_set() -> Iterator[Path]:
    """A database with the demonstration set, which each measurement copies."""
    with tempfile.TemporaryDirectory(prefix="bench-set-") as name:
        database = Path(name) / "profiles.db"
        migrate(database)
        with _servers(Path(name)) as (cache, queue, _):
            uvloop.run(_load(Settings(features=FEATURES, database=database, cache_url=cache, queue_url=queue)))
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        yield database


@contextmanager
def environment(template: Path) -> Iterator[Environment]:
    """New servers, and a copy of the database."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        database = Path(name) / "profiles.db"
        shutil.copyfile(template, database)
        with _servers(Path(name)) as (cache, queue, reference):
            users = [f"user-{number:04d}" for number in range(1, USERS + 1)]
            settings = Settings(features=FEATURES, database=database, cache_url=cache, queue_url=queue)
            yield Environment(settings, reference, users, SystemClock().now_ms())


@contextmanager
def on_postgres(here: Environment) -> Iterator[tuple[Environment, PostgresServer]]:
    """The environment with a new database `bench` of a durable PostgreSQL server, and that server."""
    with servers() as start:
        server = start(fsync="on", full_page_writes="on", shared_buffers="128MB")
        server.execute("CREATE DATABASE bench")
        url = postgres_url(server.url("bench"))
        migrate(url)
        yield here._replace(settings=replace(here.settings, database=url)), server


@contextmanager
def _servers(directory: Path) -> Iterator[tuple[str, str, str]]:
    cache = EmbeddedServer(directory / "cache", directory / "c.sock", cache_options(CACHE_MB))
    queue = EmbeddedServer(directory / "queue", directory / "q.sock", QUEUE_OPTIONS)
    reference = EmbeddedServer(directory / "reference", directory / "r.sock", QUEUE_OPTIONS)
    try:
        for server in (cache, queue, reference):
            server.start()
        yield cache.url, queue.url, reference.url
    finally:
        for server in (cache, queue, reference):
            server.stop()


async def _load(settings: Settings) -> None:
    async with open_service(settings, door="bench") as service:
        made = list(generate(users=USERS, days=DAYS, seed=1, now_ms=SystemClock().now_ms()))
        for start in range(0, len(made), PER_REQUEST):
            await service.ingestor.ingest(made[start : start + PER_REQUEST])
