"""What a server says of itself, each kind of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from app.errors import CacheUnavailable, QueueUnavailable
from app.operations.doctor.facts import ServerFacts, Unreached
from app.stores.queue.client import Queue
from app.stores.valkey.diagnostics import server_facts
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.caches import valkey_cache
from tests.support.servers import VALKEY, ask


async def test_server_tells_its_kind_and_setup(server: EmbeddedServer, flavour: str) -> None:
    found = await server_facts(server.url)
    assert isinstance(found, ServerFacts)
    assert found.flavour == ("Valkey" if flavour == VALKEY else "Redis")
    assert found.version >= (7, 0)
    assert (found.role, found.refuses, found.appends, found.snapshots) == ("master", None, False, False)
    assert abs(found.ahead_ms) <= found.unsure_ms + 1
    assert ask(server, "DBSIZE") == 0


async def test_clocks_are_compared(server: EmbeddedServer) -> None:
    found = await server_facts(server.url, now_s=lambda: time.time() - 100)
    assert isinstance(found, ServerFacts)
    assert abs(found.ahead_ms - 100_000) <= found.unsure_ms + 1


async def test_settings_that_may_not_be_asked_for_are_not_known(own_server: EmbeddedServer) -> None:
    ask(own_server, "ACL", "SETUSER", "default", "-config")
    found = await server_facts(own_server.url)
    assert isinstance(found, ServerFacts)
    assert found.snapshots is None


async def test_server_that_refuses_to_be_asked_is_no_defect_of_ours(own_server: EmbeddedServer) -> None:
    ask(own_server, "ACL", "SETUSER", "default", "-info")
    assert isinstance(await server_facts(own_server.url), Unreached)
    own_server.kill()
    found = await server_facts(own_server.url)
    assert isinstance(found, Unreached)
    assert "Error" in found.reason


@pytest.mark.parametrize(
    ("disturb", "option", "expected"),
    [
        (
            lambda server: ask(server, "CONFIG", "SET", "requirepass", "secret"),
            "",
            "it refuses the user or the password",
        ),
        (lambda server: ask(server, "ACL", "SETUSER", "default", "-info"), "", "its user may not do what is needed"),
        (lambda _: None, "?db=9999", "it has no database of that number"),
        (lambda server: server.kill(), "", "it does not answer"),
    ],
    ids=["password", "rights", "number", "gone"],
)
async def test_each_reason_to_be_out_of_reach_is_told_with_its_remedy(
    own_server: EmbeddedServer,
    disturb: Callable[[EmbeddedServer], object],
    option: str,
    expected: str,
    request: pytest.FixtureRequest,
) -> None:
    queue = Queue(own_server.url + option, Metrics())
    disturb(own_server)
    url = own_server.url + option
    found = await server_facts(url)
    assert isinstance(found, Unreached)
    assert found.reason.startswith(expected)
    cache = valkey_cache(own_server, url=url)
    with pytest.raises(CacheUnavailable) as refused:
        await cache.check()
    assert refused.value.told.startswith(expected)
    if "rights" not in request.node.name:  # a queue needs no INFO
        with pytest.raises(QueueUnavailable) as unanswered:
            await queue.depth()
        assert unanswered.value.told.startswith(expected)
    await cache.close()
    await queue.close()
