"""Real servers for tests: the embedded Valkey 9 (compare-and-set in SET) and Debian's Redis 7.0 (a Lua script).

`server` and `valkey` are shared by a whole run and emptied for each test. `own_server` starts a server that the test
may pause, kill and restart. Sockets are in a short temporary directory, because a unix socket path holds 107 bytes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.errors import CacheUnavailable
from app.stores.valkey.embedded import EmbeddedServer, server_binary
from tests.support.processes import await_listener, free_port
from tests.support.programs import missing, required
from tests.support.waiting import PATIENCE_S

VALKEY = "valkey"
REDIS = "redis"
FLAVOURS = (VALKEY, REDIS)
OPTIONS = ("--save", "", "--appendonly", "no", "--dbfilename", "dump.rdb", "--io-threads", "1")

StartServer = Callable[..., EmbeddedServer]


def binary(flavour: str) -> str:
    """The path of a flavour's binary."""
    if flavour == REDIS:
        return required("redis-server")
    try:
        return server_binary()
    except CacheUnavailable:
        missing("the embedded Valkey is missing: install the extra `embedded`")


def ask(server: EmbeddedServer, *command: str | bytes | int) -> Any:
    """Send one command on a new connection; raises the errors of redis-py."""
    with closing(Redis(unix_socket_path=str(server.socket_path), socket_timeout=PATIENCE_S)) as client:
        return client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py 5 types it not


def keys(server: EmbeddedServer) -> list[bytes]:
    """All keys of the server, sorted."""
    return sorted(ask(server, "KEYS", "*"))


def calls(server: EmbeddedServer, command: str) -> int:
    """How often the server has run a command since `CONFIG RESETSTAT`, as `set` or `script|load`."""
    return int(ask(server, "INFO", "commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


@pytest.fixture(scope="session")
def start_server() -> Iterator[StartServer]:
    """Starts servers by flavour. All are stopped at the end of the run."""
    root = Path(tempfile.mkdtemp(prefix="pf-"))
    started: list[EmbeddedServer] = []

    def start(flavour: str, *, port: int = 0, options: tuple[str, ...] = ()) -> EmbeddedServer:
        directory = root / str(len(started))
        server = EmbeddedServer(
            directory, directory.with_suffix(".sock"), (*OPTIONS, *options), binary=binary(flavour), port=port
        )
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def shared_servers(start_server: StartServer) -> Callable[[str], EmbeddedServer]:
    """One server of each flavour for the whole run. It is started on first use, and emptied on each use."""
    running: dict[str, EmbeddedServer] = {}

    def shared(flavour: str) -> EmbeddedServer:
        if flavour not in running:
            running[flavour] = start_server(flavour)
        server = running[flavour]
        ask(server, "FLUSHALL")
        return server

    return shared


@contextmanager
def sentinel(master: EmbeddedServer, directory: Path) -> Iterator[int]:
    """A sentinel that watches a master, by the name `profiles`, and decides alone; its port."""
    port, conf = free_port(), directory / "sentinel.conf"
    conf.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor profiles 127.0.0.1 {master.port} 1\n")
    with subprocess.Popen([binary(REDIS), str(conf), "--sentinel"], stdout=subprocess.DEVNULL) as running:
        try:
            await_listener(port)
            yield port
        finally:
            running.kill()


@pytest.fixture(scope="session")
def shared_sentinel(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A master, and the URL of a sentinel that watches it. Both are shared by a whole run."""
    master = start_server(REDIS, port=free_port())
    with sentinel(master, tmp_path_factory.mktemp("sentinel")) as port:
        yield master, f"redis://127.0.0.1:{port}/0?sentinel=profiles"


@pytest.fixture
def sentinel_group(shared_sentinel: tuple[EmbeddedServer, str]) -> tuple[EmbeddedServer, str]:
    """An empty master, and the URL of the sentinel that watches it."""
    ask(shared_sentinel[0], "FLUSHALL")
    return shared_sentinel


@pytest.fixture(params=[VALKEY, pytest.param(REDIS, marks=pytest.mark.slow)])  # the quick tests use Valkey
def flavour(request: pytest.FixtureRequest) -> str:
    """Each flavour in turn."""
    return str(request.param)


@pytest.fixture
def server(flavour: str, shared_servers: Callable[[str], EmbeddedServer]) -> EmbeddedServer:
    """An empty server of each flavour. It is shared, so a test must not stop or reconfigure it."""
    return shared_servers(flavour)


@pytest.fixture
def valkey(shared_servers: Callable[[str], EmbeddedServer]) -> EmbeddedServer:
    """An empty embedded Valkey, for tests that do not depend on the flavour. It is shared like `server`."""
    return shared_servers(VALKEY)


@pytest.fixture
def own_server(flavour: str, start_server: StartServer) -> Iterator[EmbeddedServer]:
    """A server of each flavour that the test may pause, kill and restart."""
    server = start_server(flavour)
    yield server
    server.kill()


@pytest.fixture
def own_valkey(start_server: StartServer) -> Iterator[EmbeddedServer]:
    """An embedded Valkey that the test may pause, kill and restart."""
    server = start_server(VALKEY)
    yield server
    server.kill()
