"""A Sentinel group as cache and queue: a failover needs no restart, and no read is stale."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from app.bootstrap.service import open_service
from app.errors import SettingsError
from app.features.clock import rfc3339
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.pool import blocking_pool
from tests.support.events import served
from tests.support.processes import free_port
from tests.support.registry import FEATURES
from tests.support.servers import REDIS, StartServer, ask, sentinel
from tests.support.waiting import PATIENCE_S, eventually_sync

VOLUME = 4


class Group(NamedTuple):
    master: EmbeddedServer
    replica: EmbeddedServer
    sentinel_port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.sentinel_port}/0?sentinel=profiles"

    def ask_sentinel(self, command: str) -> Any:
        """The reply to `SENTINEL command profiles`."""
        with closing(Redis(port=self.sentinel_port)) as client:
            return client.execute_command("SENTINEL", command, "profiles")  # type: ignore[no-untyped-call]  # in redis-py 5

    def fail_over(self) -> bool:
        """Let the replica become the master. Return false if the sentinel has not looked at it yet."""
        with suppress(ResponseError):
            return bool(self.ask_sentinel("FAILOVER"))
        return False

    def master_port(self) -> int:
        return int(self.ask_sentinel("GET-MASTER-ADDR-BY-NAME")[1])


@pytest.fixture
def group(start_server: StartServer, tmp_path: Path) -> Iterator[Group]:
    """A master, its replica and one sentinel, which has seen both. It takes half a minute to notice a dead master."""
    options = ("--repl-diskless-sync-delay", "0")
    master, replica = [start_server(REDIS, port=free_port(), options=options) for _ in range(2)]
    ask(replica, "REPLICAOF", "127.0.0.1", master.port)
    eventually_sync(lambda: ask(replica, "INFO", "replication")["master_link_status"] == "up")
    with sentinel(master, tmp_path) as port:
        opened = Group(master, replica, port)
        eventually_sync(lambda: opened.ask_sentinel("REPLICAS"))
        yield opened


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
            async with asyncio.timeout(PATIENCE_S):
                while not all([*await pair(first, second), *await pair(second, first)]):
                    pass

        await pairs_until_hits()
        group.master.kill()
        assert not (await pair(first, second))[0]
        await asyncio.to_thread(eventually_sync, group.fail_over)
        await pairs_until_hits()
        assert group.master_port() == group.replica.port


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
