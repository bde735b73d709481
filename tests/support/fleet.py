"""Real API processes and workers that share a database, a cache and a queue."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from app.settings.parsers import PostgresUrl
from app.stores.postgres.connection import connect
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.http import Connection, serving
from tests.support.processes import Program, Programs, free_port

FAULTY_WORKER = "tests.support.faulty_worker"


class Member(NamedTuple):
    program: Program
    port: int


class Fleet:
    """Starts processes, which the fixture `programs` ends."""

    def __init__(
        self, programs: Programs, store: Path | PostgresUrl, cache: EmbeddedServer, queue: EmbeddedServer
    ) -> None:
        self.store = store
        self.cache = cache
        self.queue = queue
        self._programs = programs

    def api(self, **settings: Any) -> Member:
        """Start an API process, on a free port or on the given `port`; does not wait until it answers."""
        port = settings.setdefault("port", free_port())
        return Member(self._start("serve", **settings), port)

    async def apis(self, count: int, **settings: Any) -> list[Member]:
        """Start API processes, and wait until they answer."""
        members = [self.api(**settings) for _ in range(count)]
        for member in members:
            await serving(member.port)
        return members

    def worker(self, **settings: Any) -> Member:
        """Start a worker, and wait until it works."""
        port = free_port()
        program = self._start("worker", worker_metrics_port=port, **settings)
        program.says("worker_started")
        return Member(program, port)

    def faulty_worker(self, *arguments: str, **settings: Any) -> Member:
        """Start a worker of `tests.support.faulty_worker`, and wait until it works."""
        port = free_port()
        program = self._start(*arguments, module=FAULTY_WORKER, worker_metrics_port=port, **settings)
        program.says("worker_started")
        return Member(program, port)

    @property
    def database(self) -> Path:
        """The file of the database, on SQLite."""
        assert isinstance(self.store, Path)
        return self.store

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Query the database directly."""
        if not isinstance(self.store, Path):
            with closing(connect(self.store.url).raw) as server:
                return server.execute(sql.encode(), parameters).fetchall()
        with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql, parameters).fetchall()

    def stored(self) -> Counter[str]:
        """How often each event id occurs in the log."""
        return Counter(event_id for (event_id,) in self.rows("SELECT event_id FROM event_log"))

    def unconsumed(self) -> int:
        return int(self.rows("SELECT COUNT(*) FROM outbox")[0][0])

    def _start(self, *arguments: str, module: str = "app", **settings: Any) -> Program:
        chosen: dict[str, Any] = {
            "database": self.store if isinstance(self.store, Path) else self.store.url,
            "cache_url": self.cache.url,
            "cache_timeout_ms": 5_000,  # a busy machine is no outage
            "queue_url": self.queue.url,
            "worker_metrics_port": 0,
            **settings,
        }
        return self._programs.start(*arguments, module=module, **chosen)


async def counted(port: int, name: str, *, host: str = "127.0.0.1", **labels: str) -> float:
    """The sum of the samples of a metric with these labels, from /metrics."""
    connection = Connection(port, host=host)
    try:
        text = (await connection.get("/metrics")).body.decode()
    finally:
        await connection.close()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"profiles_{name}" and labels.items() <= sample.labels.items()
    )
