"""Diagnosis of real servers of each kind."""

from collections.abc import Callable

import pytest

from app.errors import CacheUnavailable, QueueUnavailable
from app.operations.doctor import Line
from app.stores.queue.client import Queue
from app.stores.valkey.diagnostics import diagnose_cluster, diagnose_server
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.registration import parse_nodes
from app.telemetry import Metrics
from tests.integration.stores.valkey.conftest import OpenCache
from tests.support.cluster import ClusterServers
from tests.support.servers import VALKEY, ask


def by_check(lines: list[Line]) -> dict[str, tuple[str, str]]:
    return {line.check: (line.state, line.text) for line in lines}


async def test_server_in_order_is_diagnosed_as_ok(server: EmbeddedServer, flavour: str) -> None:
    lines, info = await diagnose_server("cache", server.url)
    assert info is not None
    found = by_check(lines)
    assert found["cache"][0] == "ok"
    assert found["cache"][1].startswith("Valkey" if flavour == VALKEY else "Redis")
    assert found["cache writes"] == ("ok", "it takes writes")
    assert found["cache clock"][0] == "ok"
    assert ask(server, "DBSIZE") == 0


def cluster_line(lines: list[Line]) -> tuple[str, str]:
    return by_check(lines)["cache cluster"]


async def test_cluster_is_diagnosed(cluster: ClusterServers) -> None:
    lines, info = await diagnose_server("cache", cluster.url)
    assert info is not None
    found = by_check(lines)
    assert found["cache cluster"] == ("ok", "3 masters cover all slots, and each has a replica")
    assert found["cache writes"] == ("ok", "it takes writes")
    assert {"cache", "cache clock", "cache memory"} < set(found)
    master = cluster.masters()[0]
    replica = cluster.replica_of(master)
    replica.kill()
    state, text = cluster_line((await diagnose_server("cache", cluster.url))[0])
    assert (state, f"127.0.0.1:{replica.port}" in text) == ("warn", True), "a node does not answer"
    slots = len(cluster.slots(master))
    master.kill()
    state, text = cluster_line((await diagnose_server("cache", cluster.url))[0])
    assert state == "bad"
    assert text.startswith(f"{slots} of 16384 slots are not covered")


def test_master_without_replica_is_named() -> None:
    nodes = parse_nodes(
        "a 10.0.0.1:6379@1 master - 0 0 1 connected 0-8000\n"
        "b 10.0.0.2:6379@1 master - 0 0 2 connected 8001-16383\n"
        "c 10.0.0.3:6379@1 slave a 0 0 1 connected\n"
    )
    line = diagnose_cluster(nodes, ())
    assert (line.state, line.text) == ("warn", "these masters have no replica: 10.0.0.2:6379")
    assert "8001 of 16384 slots" in diagnose_cluster(nodes, {"10.0.0.1:6379"}).text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readings_s", "state", "text"),
    [
        ((0.9, 0.9), "ok", "differs from this machine's clock by at most"),
        ((-2.5, -2.5), "warn", "ahead of"),
        ((2.5, 2.5), "warn", "behind"),
        ((-400, -400), "bad", "ahead of"),
        ((-4.5, -0.5), "ok", "differs from this machine's clock by at most"),  # 2.5 s ahead, but the reply took 4 s
    ],
)
async def test_clock_of_the_server_is_compared(
    server: EmbeddedServer, readings_s: tuple[float, float], state: str, text: str
) -> None:
    seconds, microseconds = ask(server, "TIME")
    now_s = int(seconds) + int(microseconds) / 1e6
    readings = iter(now_s + off_s for off_s in readings_s)
    found = by_check((await diagnose_server("cache", server.url, now_s=lambda: next(readings)))[0])["cache clock"]
    assert found[0] == state
    assert text in found[1]


async def test_snapshots_are_unknown_when_config_is_forbidden(own_server: EmbeddedServer) -> None:
    ask(own_server, "ACL", "SETUSER", "default", "-config")
    lines, _ = await diagnose_server("queue", own_server.url, "arq:queue")
    assert "snapshots are unknown" in by_check(lines)["queue persistence"][1]


async def test_server_that_refuses_info_is_diagnosed_as_bad(own_server: EmbeddedServer) -> None:
    ask(own_server, "ACL", "SETUSER", "default", "-info")
    for _ in range(2):
        lines, info = await diagnose_server("cache", own_server.url)
        assert info is None
        assert [(line.check, line.state) for line in lines] == [("cache", "bad")]
        assert "Error" in lines[0].text
        own_server.kill()


@pytest.mark.parametrize(
    ("disturb", "option", "expected"),
    [
        (
            lambda server: ask(server, "CONFIG", "SET", "requirepass", "secret"),
            "",
            "it refuses the user or the password",
        ),
        (lambda server: ask(server, "ACL", "SETUSER", "default", "-info"), "", "its user lacks permissions"),
        (lambda _: None, "?db=9999", "it has no database of that number"),
        (lambda server: server.kill(), "", "it does not answer"),
    ],
    ids=["password", "rights", "number", "gone"],
)
async def test_reason_why_a_server_is_unreachable_is_given(
    own_server: EmbeddedServer,
    open_cache: OpenCache,
    disturb: Callable[[EmbeddedServer], object],
    option: str,
    expected: str,
    request: pytest.FixtureRequest,
) -> None:
    queue = Queue(own_server.url + option, Metrics())
    disturb(own_server)
    url = own_server.url + option
    (line,), _ = await diagnose_server("cache", url)
    assert line.text.startswith(f"it cannot be diagnosed: {expected}")
    cache = await open_cache(own_server, url=url)
    with pytest.raises(CacheUnavailable) as refused:
        await cache.check()
    assert refused.value.public_reason.startswith(expected)
    if "rights" not in request.node.name:  # a queue needs no INFO
        with pytest.raises(QueueUnavailable) as unanswered:
            await queue.depth()
        assert unanswered.value.public_reason.startswith(expected)
    await queue.close()
