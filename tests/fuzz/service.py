"""The service that is fuzzed: an API process and a worker with a database, a cache and a queue of their own."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from app.stores.migrate import migrate
from app.stores.valkey.embedded import QUEUE_OPTIONS, EmbeddedServer, cache_options
from tests.fuzz.openapi import populate
from tests.support.live import API_KEYS
from tests.support.processes import Programs, free_port
from tests.support.waiting import eventually_sync

CACHE_MB = 64
READY = "serving"


class FuzzedService(NamedTuple):
    """`ids` are ids that exist, by the name of the path parameter. `log` returns the output of the API process."""

    url: str
    ids: dict[str, list[Any]]
    log: Callable[[], str]


def _listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def running_service() -> Iterator[FuzzedService]:
    directory = Path(tempfile.mkdtemp(prefix="pf-"))
    servers = {
        name: EmbeddedServer(directory / name, directory / f"{name}.sock", options)
        for name, options in (("cache", cache_options(CACHE_MB)), ("queue", QUEUE_OPTIONS))
    }
    programs = Programs(directory)
    database = directory / "profiles.db"
    try:
        for server in servers.values():
            server.start()
        migrate(database)
        ids = populate(database)
        settings: dict[str, Any] = {
            "database": database,
            "port": free_port(),
            "worker_metrics_port": 0,
            "cache_url": servers["cache"].url,
            "queue_url": servers["queue"].url,
            "api_keys": ",".join(f"{key.name}:{'+'.join(key.scopes)}:{key.sha256.hex()}" for key in API_KEYS),
        }
        serving = programs.start("serve", **settings)
        programs.start("worker", **settings)
        serving.says(READY)
        eventually_sync(lambda: _listening(settings["port"]), 10)
        yield FuzzedService(f"http://127.0.0.1:{settings['port']}", ids, lambda: serving.output)
    finally:
        programs.close()
        for server in servers.values():
            server.kill()
        shutil.rmtree(directory, ignore_errors=True)
