"""The cache on real servers: fill paths, refusals, timeouts, the breaker, and replies that match their commands.

`tests.integration.profiles` tests the contract of the port.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from app.errors import CacheRefused, CacheUnavailable
from app.profiles.ports import Cell, Epoch, Fill
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.integration.stores.valkey.conftest import OpenCache
from tests.support.proxy import Proxy
from tests.support.servers import REDIS, VALKEY, StartServer, ask, binary, calls
from tests.support.waiting import PATIENCE_S, eventually

CELL = Cell("ann", "f")
VALUE = b"V0123abcd:7:1:2:3"


@pytest.fixture
async def cache(server: EmbeddedServer, open_cache: OpenCache) -> ValkeyCache:
    return await open_cache(server)


async def fill(cache: ValkeyCache, *cells: Cell, value: Callable[[Cell], bytes] = lambda _: VALUE) -> list[bool]:
    epoch, _ = await cache.read(cells)
    tokens = await cache.lease(epoch, cells)
    return await cache.fill(
        epoch, [Fill(cell, token, value(cell), 60_000) for cell, token in zip(cells, tokens, strict=True)]
    )


async def answered(cache: ValkeyCache, cell: Cell = CELL) -> tuple[Epoch, bytes | None]:
    """The epoch and the content of a cell. Tries again if a busy machine lets a short timeout pass."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(CacheUnavailable):
                await cache.open()
                epoch, (held,) = await cache.read([cell])
                await eventually(lambda: cache.available)
                return epoch, held


def test_user_id_is_percent_encoded_in_the_key() -> None:
    assert key("0123456789ab", Cell("ann", "f")) == b"pf:0123456789ab:{ann}:f"
    assert key("e", Cell("a{b}c d%é", "f")) == b"pf:e:{a%7Bb%7Dc%20d%25%C3%A9}:f"


async def test_fill_uses_ifeq_if_the_server_has_it(cache: ValkeyCache, server: EmbeddedServer, flavour: str) -> None:
    ask(server, "CONFIG", "RESETSTAT")
    assert await fill(cache, CELL, Cell("bob", "f")) == [True, True]
    assert await fill(cache, Cell("cid", "f")) == [True]
    assert calls(server, "eval") == {VALKEY: 0, REDIS: 3}[flavour]
    attempts = {VALKEY: 3, REDIS: 2}[flavour]  # Redis refuses the syntax of the first two, and no more are sent
    assert calls(server, "set") - attempts == {VALKEY: 3, REDIS: 3 + 3}[flavour], "leases, and SETs of the script"


async def test_fills_succeed_when_scripts_were_flushed(cache: ValkeyCache, server: EmbeddedServer) -> None:
    assert await fill(cache, CELL) == [True]
    ask(server, "SCRIPT", "FLUSH")
    assert await fill(cache, Cell("bob", "f"), Cell("cid", "f")) == [True, True]
    epoch, _ = await cache.read([CELL])
    ask(server, "SCRIPT", "FLUSH")
    assert await cache.drop_exactly(epoch, [(CELL, VALUE), (Cell("bob", "f"), VALUE)]) == 2


async def test_fill_path_is_tried_again_on_another_server(start_server: StartServer, open_cache: OpenCache) -> None:
    old = start_server(REDIS)
    cache = await open_cache(old)
    assert await fill(cache, CELL) == [True]
    old.kill()
    new = EmbeddedServer(old.directory, old.socket_path, ("--save", ""), binary=binary(VALKEY))
    new.start()
    try:
        with pytest.raises(CacheUnavailable):
            await cache.fill("the epoch before", [Fill(CELL, b"L", VALUE, 60_000)])
        with suppress(CacheUnavailable):  # the end of the connection for reads may not have been noticed yet
            await cache.read([CELL])
        await cache.open()
        assert await fill(cache, CELL) == [True]
        assert calls(new, "eval") == 0
    finally:
        new.kill()


async def test_reads_continue_and_writes_are_refused_on_a_replica(
    own_server: EmbeddedServer, open_cache: OpenCache
) -> None:
    cache = await open_cache(own_server)
    assert await fill(cache, CELL) == [True]
    epoch, _ = await cache.read([CELL])
    ask(own_server, "REPLICAOF", "127.0.0.1", "1")
    for _ in range(4):  # more than opens the breaker
        assert await cache.read([CELL]) == (epoch, [VALUE])
        with pytest.raises(CacheRefused):
            await cache.drop([CELL])
        with pytest.raises(CacheRefused):
            await cache.lease(epoch, [Cell("bob", "f")])
        with pytest.raises(CacheRefused):
            await cache.fill(epoch, [Fill(CELL, VALUE, b"V", 60_000)])
        with pytest.raises(CacheRefused):
            await cache.drop_exactly(epoch, [(CELL, VALUE)])
    assert cache.available, "a server that answers is available"
    ask(own_server, "REPLICAOF", "NO", "ONE")
    await cache.drop([CELL])
    assert await cache.read([CELL]) == (epoch, [None])


async def test_fills_are_refused_and_drops_continue_when_memory_is_full(
    own_server: EmbeddedServer, open_cache: OpenCache
) -> None:
    cache = await open_cache(own_server)
    epoch, _ = await cache.read([CELL])
    (token,) = await cache.lease(epoch, [CELL])
    ask(own_server, "CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(CacheRefused):
        await cache.fill(epoch, [Fill(CELL, token, VALUE, 60_000)])
    with pytest.raises(CacheRefused):
        await cache.lease(epoch, [Cell("bob", "f")])
    assert await cache.read([CELL]) == (epoch, [token])
    await cache.drop([CELL])
    assert await cache.read([CELL]) == (epoch, [None])


async def test_key_of_another_type_is_deleted(cache: ValkeyCache, server: EmbeddedServer) -> None:
    other = Cell("bob", "f")
    epoch, _ = await cache.read([CELL, other])
    ask(server, "RPUSH", key(epoch, CELL).decode(), "other")
    assert await cache.read([CELL, other]) == (epoch, [None, None])
    leases = await cache.lease(epoch, [CELL, other])
    assert (await cache.read([CELL, other]))[1] == [None, leases[1]]
    assert await cache.fill(epoch, [Fill(CELL, leases[0], b"V", 9_000), Fill(other, leases[1], b"V", 9_000)]) == [
        False,
        True,
    ]
    (lease,) = await cache.lease(epoch, [CELL])
    assert await cache.fill(epoch, [Fill(CELL, lease, b"V", 9_000)]) == [True]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["read", "lease", "fill", "drop", "drop_exactly"])
async def test_command_times_out_when_the_server_is_paused(
    own_server: EmbeddedServer, open_cache: OpenCache, command: str
) -> None:
    cache = await open_cache(own_server, timeout_ms=100)
    epoch, _ = await answered(cache)
    own_server.signal(signal.SIGSTOP)
    work: Callable[[], Coroutine[Any, Any, object]] = {
        "read": lambda: cache.read([CELL]),
        "lease": lambda: cache.lease(epoch, [CELL]),
        "fill": lambda: cache.fill(epoch, [Fill(CELL, b"L", VALUE, 60_000)]),
        "drop": lambda: cache.drop([CELL]),
        "drop_exactly": lambda: cache.drop_exactly(epoch, [(CELL, VALUE)]),
    }[command]
    loop = asyncio.get_running_loop()
    for _ in range(2):  # on an open connection, and on one that cannot be opened
        started = loop.time()
        with pytest.raises(CacheUnavailable) as raised:
            await asyncio.wait_for(work(), PATIENCE_S)
        assert not isinstance(raised.value, CacheRefused)
        assert loop.time() - started > 0.09


async def test_breaker_opens_while_the_server_is_paused(own_server: EmbeddedServer, open_cache: OpenCache) -> None:
    metrics = Metrics()
    cache = await open_cache(own_server, timeout_ms=50, metrics=metrics)
    await answered(cache)
    before = metrics.collectors.get_sample_value("profiles_cache_errors_total", {"kind": "silent"}) or 0
    own_server.signal(signal.SIGSTOP)
    for number in range(3):
        assert cache.available, f"after {number} failures"
        with pytest.raises(CacheUnavailable):
            await cache.read([CELL])
    assert not cache.available
    assert metrics.collectors.get_sample_value("profiles_cache_available") == 0
    assert metrics.collectors.get_sample_value("profiles_cache_errors_total", {"kind": "silent"}) == before + 3
    own_server.signal(signal.SIGCONT)
    await eventually(lambda: cache.available)
    assert metrics.collectors.get_sample_value("profiles_cache_available") == 1
    assert (await answered(cache))[1] is None


@pytest.mark.slow
async def test_breaker_stays_closed_when_failures_are_not_in_a_row(
    own_server: EmbeddedServer, open_cache: OpenCache
) -> None:
    cache = await open_cache(own_server, timeout_ms=1_000)
    await cache.read([CELL])
    for _ in range(2):
        own_server.signal(signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(CacheUnavailable):
                await cache.read([CELL])
        own_server.signal(signal.SIGCONT)
        await cache.read([CELL])
        assert cache.available


async def test_close_stops_probing(own_server: EmbeddedServer, open_cache: OpenCache) -> None:
    cache = await open_cache(own_server)
    own_server.kill()
    for _ in range(3):
        with pytest.raises(CacheUnavailable):
            await cache.read([CELL])
    assert not cache.available
    await cache.close()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def own_value(cell: Cell) -> bytes:
    return b"V" + cell.user_id.encode()


async def test_read_gets_its_own_reply_when_others_were_cancelled(
    valkey: EmbeddedServer, valkey_proxy: Proxy, open_cache: OpenCache
) -> None:
    cells = [Cell(f"user{number}", "f") for number in range(20)]
    cache = await open_cache(valkey, url=valkey_proxy.url)
    assert all(await fill(cache, *cells, value=own_value))
    for cell in cells:
        valkey_proxy.silence()
        reading = asyncio.get_running_loop().create_task(cache.read([cell]))
        await eventually(lambda: valkey_proxy.holding)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        valkey_proxy.mend()
        for other in cells[:3]:
            assert (await cache.read([other]))[1] == [own_value(other)]
    together = await asyncio.gather(*(cache.read([cell]) for cell in cells))
    assert [held for _, held in together] == [[own_value(cell)] for cell in cells]
    await cache.close()
    await eventually(lambda: ask(valkey, "INFO", "clients")["connected_clients"] == 1)  # the connection of `ask`


@pytest.mark.slow
async def test_read_gets_its_own_reply_when_others_timed_out(
    valkey: EmbeddedServer, valkey_proxy: Proxy, open_cache: OpenCache
) -> None:
    cells = [Cell(f"user{number}", "f") for number in range(4)]
    cache = await open_cache(valkey, url=valkey_proxy.url, timeout_ms=1_000)
    assert all(await fill(cache, *cells, value=own_value))
    valkey_proxy.silence()
    late = [await refusal(cache, cells[0]), await refusal(cache, cells[1])]
    assert not any(isinstance(error, CacheRefused) for error in late)
    valkey_proxy.mend()
    for cell in reversed(cells):
        assert (await answered(cache, cell))[1] == own_value(cell)


async def refusal(cache: ValkeyCache, cell: Cell) -> CacheUnavailable:
    with pytest.raises(CacheUnavailable) as raised:
        await cache.read([cell])
    return raised.value


@pytest.mark.slow
async def test_late_fill_is_compared_after_its_timeout(
    valkey: EmbeddedServer, valkey_proxy: Proxy, open_cache: OpenCache
) -> None:
    slow, other = await open_cache(valkey, url=valkey_proxy.url, timeout_ms=1_000), await open_cache(valkey)
    epoch, _ = await slow.read([CELL])
    (token,) = await slow.lease(epoch, [CELL])
    assert await fill(slow, Cell("bob", "f")) == [True]  # opens the connection for fills
    valkey_proxy.silence()
    with pytest.raises(CacheUnavailable):
        await slow.fill(epoch, [Fill(CELL, token, VALUE, 60_000)])
    await other.drop([CELL])
    (newer,) = await other.lease(epoch, [CELL])
    ask(valkey, "CONFIG", "RESETSTAT")
    valkey_proxy.mend()
    await eventually(lambda: calls(valkey, "set"))
    assert await other.read([CELL]) == (epoch, [newer])


async def test_cache_is_unavailable_when_no_server_answers(valkey: EmbeddedServer, open_cache: OpenCache) -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(babble, "127.0.0.1", 0)
    cache = await open_cache(valkey, url=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    with pytest.raises(CacheUnavailable):
        await cache.read([CELL])
    listener.close()
    await listener.wait_closed()


@pytest.mark.parametrize(
    ("flavour", "rule", "refused"),
    [
        (VALKEY, "-mget", "a read"),
        (VALKEY, "-set", "a lease"),
        (REDIS, "-@scripting", "a fill"),
        (VALKEY, "-del", "a deletion"),
    ],
)
async def test_check_names_the_refused_command(
    start_server: StartServer, open_cache: OpenCache, flavour: str, rule: str, refused: str
) -> None:
    server = start_server(flavour)
    cache = await open_cache(server)
    await cache.check()
    assert ask(server, "DBSIZE") == 0
    ask(server, "ACL", "SETUSER", "default", rule)
    with pytest.raises(CacheRefused, match=f"it refuses {refused}: NOPERM"):
        await cache.check()


async def test_user_is_deleted_under_every_epoch(cache: ValkeyCache, server: EmbeddedServer) -> None:
    others = [f"pf:old:{{ann{number}}}:f" for number in range(3_000)]
    theirs = ["pf:old:{ann}:f", "pf:older:{ann}:g", "pf:e:{a%2A%20b}:f"]
    ask(server, "MSET", *(part for name in (*others, *theirs) for part in (name, "V")))
    assert await fill(cache, CELL) == [True]
    await cache.drop_user("ann")
    await cache.drop_user("a* b")
    epoch, (held,) = await cache.read([CELL])
    assert held is None
    assert ask(server, "EXISTS", *theirs, key(epoch, CELL)) == 0
    assert ask(server, "EXISTS", *others) == 3_000
    ask(server, "DEL", *others)
