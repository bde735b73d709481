"""The cache on real servers, beyond the contract of the port: fill paths, refusals, timeouts, the breaker, and replies
that must never reach the wrong command.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from app.errors import CacheRefused, CacheUnavailable
from app.profiles.ports import Cell, Fill
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.embedded import EmbeddedServer
from app.telemetry import Metrics
from tests.support.caches import valkey_cache
from tests.support.proxy import Proxy, proxy
from tests.support.servers import REDIS, VALKEY, StartServer, ask, binary, calls
from tests.support.waiting import PATIENCE_S, eventually

CELL = Cell("ann", "f")
VALUE = b"V0123abcd:7:1:2:3"


@pytest.fixture
async def cache(server: EmbeddedServer) -> AsyncIterator[ValkeyCache]:
    made = valkey_cache(server)
    yield made
    await made.close()


@pytest.fixture
async def hasty(own_server: EmbeddedServer) -> AsyncIterator[ValkeyCache]:
    """A cache with a short timeout, on a server that may be disturbed."""
    made = valkey_cache(own_server, timeout_ms=100)
    yield made
    own_server.signal(signal.SIGCONT)
    await made.close()


async def fill(cache: ValkeyCache, *cells: Cell, value: bytes = VALUE) -> list[bool]:
    epoch, _ = await cache.read(cells)
    tokens = await cache.lease(epoch, cells)
    return await cache.fill(
        epoch, [Fill(cell, token, value, 60_000) for cell, token in zip(cells, tokens, strict=True)]
    )


def test_a_key_is_what_the_design_says_when_the_id_is_odd() -> None:
    assert key("0123456789ab", Cell("ann", "f")) == b"pf:0123456789ab:{ann}:f"
    assert key("e", Cell("a{b}c d%é", "f")) == b"pf:e:{a%7Bb%7Dc%20d%25%C3%A9}:f"


async def test_the_right_fill_path_is_used_when_the_server_has_it(
    cache: ValkeyCache, server: EmbeddedServer, flavour: str
) -> None:
    ask(server, "CONFIG", "RESETSTAT")
    assert await fill(cache, CELL, Cell("bob", "f")) == [True, True]
    assert await fill(cache, Cell("cid", "f")) == [True]
    assert calls(server, "evalsha") == {VALKEY: 0, REDIS: 3 + calls(server, "script|load") * 2}[flavour]
    attempts = {VALKEY: 3, REDIS: 2}[flavour]  # Redis refuses the syntax of the first two, and is not asked again
    assert calls(server, "set") - attempts == {VALKEY: 3, REDIS: 3 + 3}[flavour], "leases, and what the script sets"


async def test_fills_land_when_scripts_were_flushed(cache: ValkeyCache, server: EmbeddedServer) -> None:
    assert await fill(cache, CELL) == [True]
    ask(server, "SCRIPT", "FLUSH")
    assert await fill(cache, Cell("bob", "f"), Cell("cid", "f")) == [True, True]
    epoch, _ = await cache.read([CELL])
    ask(server, "SCRIPT", "FLUSH")
    assert await cache.drop_exactly(epoch, [(CELL, VALUE), (Cell("bob", "f"), VALUE)]) == 2


async def test_the_fill_path_is_found_out_anew_when_another_server_takes_over(start_server: StartServer) -> None:
    old = start_server(REDIS)
    cache = valkey_cache(old)
    assert await fill(cache, CELL) == [True]
    old.kill()
    new = EmbeddedServer(old.directory, old.socket_path, ("--save", ""), binary=binary(VALKEY))
    new.start()
    try:
        with pytest.raises(CacheUnavailable):
            await cache.fill("the epoch before", [Fill(CELL, b"L", VALUE, 60_000)])
        with suppress(CacheUnavailable):  # the end of the lane for reads may not have been seen yet
            await cache.read([CELL])
        assert await fill(cache, CELL) == [True]
        assert calls(new, "evalsha") == 0
    finally:
        await cache.close()
        new.kill()


async def test_writes_are_refused_and_reads_go_on_when_the_server_is_a_replica(
    hasty: ValkeyCache, own_server: EmbeddedServer
) -> None:
    assert await fill(hasty, CELL) == [True]
    epoch, _ = await hasty.read([CELL])
    ask(own_server, "REPLICAOF", "127.0.0.1", "1")
    for _ in range(4):  # more often than it takes to open the breaker
        assert await hasty.read([CELL]) == (epoch, [VALUE])
        with pytest.raises(CacheRefused):
            await hasty.drop([CELL])
        with pytest.raises(CacheRefused):
            await hasty.lease(epoch, [Cell("bob", "f")])
        with pytest.raises(CacheRefused):
            await hasty.fill(epoch, [Fill(CELL, VALUE, b"V", 60_000)])
        with pytest.raises(CacheRefused):
            await hasty.drop_exactly(epoch, [(CELL, VALUE)])
    assert hasty.available, "a server that answers is not away"
    ask(own_server, "REPLICAOF", "NO", "ONE")
    await hasty.drop([CELL])
    assert await hasty.read([CELL]) == (epoch, [None])


async def test_growth_is_refused_and_drops_go_on_when_memory_is_full(
    hasty: ValkeyCache, own_server: EmbeddedServer
) -> None:
    epoch, _ = await hasty.read([CELL])
    (token,) = await hasty.lease(epoch, [CELL])
    ask(own_server, "CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(CacheRefused):
        await hasty.fill(epoch, [Fill(CELL, token, VALUE, 60_000)])
    with pytest.raises(CacheRefused):
        await hasty.lease(epoch, [Cell("bob", "f")])
    assert await hasty.read([CELL]) == (epoch, [token])
    await hasty.drop([CELL])
    assert await hasty.read([CELL]) == (epoch, [None])


async def test_a_key_of_another_type_is_deleted_and_filled_again(cache: ValkeyCache, server: EmbeddedServer) -> None:
    other = Cell("bob", "f")
    epoch, _ = await cache.read([CELL, other])
    ask(server, "RPUSH", key(epoch, CELL).decode(), "not ours")
    assert await cache.read([CELL, other]) == (epoch, [None, None])
    leases = await cache.lease(epoch, [CELL, other])
    assert (await cache.read([CELL, other]))[1] == [None, leases[1]]
    assert await cache.fill(epoch, [Fill(CELL, leases[0], b"V", 9_000), Fill(other, leases[1], b"V", 9_000)]) == [
        False,
        True,
    ]
    (lease,) = await cache.lease(epoch, [CELL])
    assert await cache.fill(epoch, [Fill(CELL, lease, b"V", 9_000)]) == [True]


@pytest.mark.parametrize("command", ["read", "lease", "fill", "drop", "drop_exactly"])
async def test_a_command_gives_up_in_time_when_the_server_is_paused(
    hasty: ValkeyCache, own_server: EmbeddedServer, command: str
) -> None:
    epoch, _ = await hasty.read([CELL])
    own_server.signal(signal.SIGSTOP)
    work: Callable[[], Awaitable[object]] = {
        "read": lambda: hasty.read([CELL]),
        "lease": lambda: hasty.lease(epoch, [CELL]),
        "fill": lambda: hasty.fill(epoch, [Fill(CELL, b"L", VALUE, 60_000)]),
        "drop": lambda: hasty.drop([CELL]),
        "drop_exactly": lambda: hasty.drop_exactly(epoch, [(CELL, VALUE)]),
    }[command]
    loop = asyncio.get_running_loop()
    for _ in range(2):  # on a connection that was made before, and on one that cannot be made
        started = loop.time()
        with pytest.raises(CacheUnavailable) as raised:
            await work()
        assert not isinstance(raised.value, CacheRefused)
        assert 0.09 < loop.time() - started < 1


async def test_the_breaker_opens_and_closes_by_itself_when_the_server_is_paused(own_server: EmbeddedServer) -> None:
    metrics = Metrics()
    cache = valkey_cache(own_server, timeout_ms=50, metrics=metrics)
    await cache.read([CELL])
    own_server.signal(signal.SIGSTOP)
    for number in range(3):
        assert cache.available, f"after {number} failures"
        with pytest.raises(CacheUnavailable):
            await cache.read([CELL])
    assert not cache.available
    assert metrics.collectors.get_sample_value("profiles_cache_available") == 0
    assert metrics.collectors.get_sample_value("profiles_cache_errors_total", {"kind": "silent"}) == 3
    own_server.signal(signal.SIGCONT)
    await eventually(lambda: cache.available)
    assert metrics.collectors.get_sample_value("profiles_cache_available") == 1
    _, held = await cache.read([CELL])
    assert held == [None]
    await cache.close()


async def test_the_breaker_stays_closed_when_failures_are_not_in_a_row(
    hasty: ValkeyCache, own_server: EmbeddedServer
) -> None:
    for _ in range(2):
        own_server.signal(signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(CacheUnavailable):
                await hasty.read([CELL])
        own_server.signal(signal.SIGCONT)
        await hasty.read([CELL])
        assert hasty.available


async def test_close_ends_probing_when_the_breaker_is_open(own_server: EmbeddedServer) -> None:
    cache = valkey_cache(own_server, timeout_ms=50)
    own_server.kill()
    for _ in range(3):
        with pytest.raises(CacheUnavailable):
            await cache.read([CELL])
    assert not cache.available
    await cache.close()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


@pytest.fixture
async def line(valkey: EmbeddedServer) -> AsyncIterator[Proxy]:
    async with proxy(valkey.socket_path) as opened:
        yield opened


async def values_of_each(cache: ValkeyCache, cells: list[Cell]) -> None:
    """Fill cells each with a value of its own."""
    epoch, _ = await cache.read(cells)
    tokens = await cache.lease(epoch, cells)
    assert all(
        await cache.fill(
            epoch, [Fill(cell, token, own_value(cell), 60_000) for cell, token in zip(cells, tokens, strict=True)]
        )
    )


def own_value(cell: Cell) -> bytes:
    return b"V" + cell.user_id.encode()


async def test_every_read_gets_its_own_reply_when_others_were_cancelled(valkey: EmbeddedServer, line: Proxy) -> None:
    cells = [Cell(f"user{number}", "f") for number in range(20)]
    cache = valkey_cache(valkey, url=line.url)
    await values_of_each(cache, cells)
    for cell in cells:
        line.silence()
        reading = asyncio.get_running_loop().create_task(cache.read([cell]))
        await eventually(lambda: line.holding)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        line.mend()
        for other in cells[:3]:
            assert (await cache.read([other]))[1] == [own_value(other)]
    together = await asyncio.gather(*(cache.read([cell]) for cell in cells))
    assert [held for _, held in together] == [[own_value(cell)] for cell in cells]
    await cache.close()
    await eventually(lambda: ask(valkey, "INFO", "clients")["connected_clients"] == 1)  # the one that asks


async def test_every_read_gets_its_own_reply_when_others_timed_out(valkey: EmbeddedServer, line: Proxy) -> None:
    cells = [Cell(f"user{number}", "f") for number in range(4)]
    cache = valkey_cache(valkey, url=line.url, timeout_ms=150)
    await values_of_each(cache, cells)
    line.silence()
    late = [await refusal(cache, cells[0]), await refusal(cache, cells[1])]
    assert not any(isinstance(error, CacheRefused) for error in late)
    line.mend()
    for cell in reversed(cells):
        assert await answered(cache, cell) == own_value(cell)
    await cache.close()


async def answered(cache: ValkeyCache, cell: Cell) -> bytes | None:
    """What a cell holds, however often a machine that is busy with other things lets the short time pass."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(CacheUnavailable):
                _, (held,) = await cache.read([cell])
                return held


async def refusal(cache: ValkeyCache, cell: Cell) -> CacheUnavailable:
    with pytest.raises(CacheUnavailable) as raised:
        await cache.read([cell])
    return raised.value


async def test_a_fill_that_timed_out_is_still_compared_when_it_arrives_late(
    valkey: EmbeddedServer, line: Proxy
) -> None:
    slow, other = valkey_cache(valkey, url=line.url, timeout_ms=150), valkey_cache(valkey)
    epoch, _ = await slow.read([CELL])
    (token,) = await slow.lease(epoch, [CELL])
    assert await fill(slow, Cell("bob", "f")) == [True]  # so that the lane for fills is open
    line.silence()
    with pytest.raises(CacheUnavailable):
        await slow.fill(epoch, [Fill(CELL, token, VALUE, 60_000)])
    await other.drop([CELL])
    (newer,) = await other.lease(epoch, [CELL])
    ask(valkey, "CONFIG", "RESETSTAT")
    line.mend()
    await eventually(lambda: calls(valkey, "set"))
    assert await other.read([CELL]) == (epoch, [newer])
    await slow.close()
    await other.close()


async def test_the_cache_is_unavailable_when_what_answers_is_no_server(tmp_path: Path, valkey: EmbeddedServer) -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(babble, "127.0.0.1", 0)
    cache = valkey_cache(valkey, url=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}", timeout_ms=200)
    with pytest.raises(CacheUnavailable):
        await cache.read([CELL])
    await cache.close()
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
async def test_the_check_names_what_the_server_refuses(
    start_server: StartServer, flavour: str, rule: str, refused: str
) -> None:
    server = start_server(flavour)
    cache = valkey_cache(server)
    await cache.check()
    assert ask(server, "DBSIZE") == 0
    ask(server, "ACL", "SETUSER", "default", rule)
    with pytest.raises(CacheRefused, match=f"it refuses {refused}: NOPERM"):
        await cache.check()
    await cache.close()


async def test_a_users_values_go_under_every_epoch(cache: ValkeyCache, server: EmbeddedServer) -> None:
    others = [f"pf:old:{{ann{number}}}:f" for number in range(3_000)]
    theirs = ["pf:old:{ann}:f", "pf:older:{ann}:g", "pf:e:{a%2A%20b}:f"]
    for name in (*others, *theirs):
        ask(server, "SET", name, "V")
    assert await fill(cache, CELL) == [True]
    await cache.drop_user("ann")
    await cache.drop_user("a* b")
    epoch, (held,) = await cache.read([CELL])
    assert held is None
    assert ask(server, "EXISTS", *theirs, key(epoch, CELL)) == 0
    assert ask(server, "EXISTS", *others) == 3_000
    ask(server, "DEL", *others)
