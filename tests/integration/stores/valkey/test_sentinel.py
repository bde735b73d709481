"""A Sentinel group as cache and queue: a failover needs no restart, and no read is stale."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.bootstrap.service import open_service
from app.errors import SettingsError
from app.features.clock import rfc3339
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.pool import blocking_pool
from tests.support.events import served
from tests.support.processes import free_port
from tests.support.registry import FEATURES
from tests.support.servers import REDIS, ask, binary
from tests.support.waiting import eventually_sync

NAME = "profiles"
VOLUME = 4


class Group:
    """A master, its replica, and one sentinel that decides alone."""

    def __init__(self, directory: Path) -> None:
        self.program = binary(REDIS)
        self.ports = [free_port(), free_port()]
        self.sentinel_port = free_port()
        self.children = [self._start(directory, port) for port in self.ports]
        self.ask(self.ports[1], "REPLICAOF", "127.0.0.1", str(self.ports[0]))
        conf = directory / "sentinel.conf"
        conf.write_text(
            f"port {self.sentinel_port}\nbind 127.0.0.1\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.ports[0]} 1\n"
            f"sentinel down-after-milliseconds {NAME} 500\nsentinel failover-timeout {NAME} 2000\n"
        )
        command = [self.program, str(conf), "--sentinel"]
        self.children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        eventually_sync(lambda: self.answers("SENTINEL", "REPLICAS", NAME))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.sentinel_port}/0?sentinel={NAME}"

    def ask(self, port: int, *command: str) -> Any:
        with closing(Redis(port=port, socket_timeout=2)) as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py 5 does not type it

    def answers(self, *command: str) -> Any:
        try:
            return self.ask(self.sentinel_port, *command)
        except OSError:
            return None
        except Exception as error:
            if "connect" in str(error).lower():
                return None
            raise

    def master_port(self) -> int:
        return int(self.ask(self.sentinel_port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1])

    def stop(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()

    def _start(self, directory: Path, port: int) -> subprocess.Popen[bytes]:
        home = directory / str(port)
        home.mkdir()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), "--save", ""]
        child = subprocess.Popen([self.program, *options, "--repl-diskless-sync-delay", "0"], stdout=subprocess.DEVNULL)
        eventually_sync(lambda: self._pings(port))
        return child

    def _pings(self, port: int) -> bool:
        try:
            return bool(self.ask(port, "PING"))
        except Exception:  # not listening yet, or loading
            return False


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    directory = tmp_path / "group"
    directory.mkdir()
    opened = Group(directory)
    yield opened
    opened.stop()
    shutil.rmtree(directory)


@pytest.mark.slow
async def test_no_read_is_stale_when_the_master_fails_over(database_path: Path, group: Group) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=group.url, queue_url=group.url)
    sent = 0
    async with open_service(settings, door="http") as first, open_service(settings, door="http") as second:

        async def pair(writer: Any, reader: Any) -> tuple[bool, bool]:
            nonlocal sent
            sent += 1
            at_ms = first.clock.now_ms() - 1_000
            receipt = await writer.ingestor.ingest([served("ada", at_ms)])
            reading = (await reader.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
            assert int(reading.json) == sent, f"stale after {rfc3339(at_ms)}"
            await reader.reader.close()  # the fill has been answered
            again = (await reader.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
            return receipt.invalidated, again.cached

        async def pairs_until_hits() -> None:
            for _ in range(2_000):
                outcomes = [await pair(first, second), await pair(second, first)]
                if all(invalidated and cached for invalidated, cached in outcomes):
                    return
            raise AssertionError("no read was a hit again")

        await pairs_until_hits()
        group.children[0].kill()
        owed = not (await pair(first, second))[0]
        await pairs_until_hits()
        assert owed
        assert group.master_port() == group.ports[1]


async def test_database_of_the_query_is_used(sentinel_group: tuple[EmbeddedServer, str]) -> None:
    server, url = sentinel_group
    for form in (url.replace("/0?", "/3?"), url.replace("/0?", "/?db=3&")):
        client = AsyncRedis(connection_pool=blocking_pool(form, 5, 1))
        await client.set("key", form)
        await client.aclose(close_connection_pool=True)
        assert list(ask(server, "INFO", "keyspace")) == ["db3"]
        ask(server, "FLUSHALL")


def test_url_of_a_group_is_refused_when_an_address_is_invalid() -> None:
    with pytest.raises(ValueError, match="host:port"):
        blocking_pool("redis://a:b:c/0?sentinel=profiles", 0.1, 1)


async def test_setting_is_named_when_its_url_is_invalid(database_path: Path) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url="redis://a:1:2,b/0?sentinel=profiles")
    with pytest.raises(SettingsError, match="PROFILES_CACHE_URL"):
        async with open_service(settings, door="http"):
            pass
