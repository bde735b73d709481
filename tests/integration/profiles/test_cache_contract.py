"""What the cache promises on every server: embedded Valkey (`SET … IFEQ`), Redis 7.0 (a Lua script), the master of a
Sentinel group and clusters of both keep the same rules.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from app.errors import CacheRefused, CacheUnavailable
from app.profiles.ports import Cell, Fill
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.caches import LEASE_MS, ClusterSubject, ServerSubject
from tests.support.cluster import ClusterServers
from tests.support.servers import FLAVOURS, REDIS, VALKEY, StartServer

CELL = Cell("ann", "tip_volume_30d")
OTHER = Cell("bob", "tip_volume_30d")
VALUE = b"V0123abcd:7:1:2:3.5"
NEWER = b"V0123abcd:8:1:2:4.5"
ODD_IDS = [
    *("%", "%41", "A", "{", "}", "{a}", "a}:{b", "a b", "a%20b", "🦊", "a:b", ":", "a\\b", '"', "ä", "a*", "?", "~"),
]


@pytest.fixture(
    params=[
        *FLAVOURS,
        "sentinel",
        pytest.param("cluster", marks=pytest.mark.slow),
        pytest.param("redis cluster", marks=pytest.mark.slow),
    ]
)
async def subject(
    request: pytest.FixtureRequest,
    shared_servers: Callable[[str], EmbeddedServer],
    shared_clusters: Callable[[str], ClusterServers],
) -> AsyncIterator[ServerSubject]:
    if request.param == "sentinel":
        made = ServerSubject(*request.getfixturevalue("sentinel_group"))
    elif "cluster" in request.param:
        made = ClusterSubject(shared_clusters(REDIS if "redis" in request.param else VALKEY))
    else:
        made = ServerSubject(shared_servers(request.param))
    yield await made.open()
    await made.close()


@pytest.fixture(params=FLAVOURS)
async def restartable(request: pytest.FixtureRequest, start_server: StartServer) -> AsyncIterator[ServerSubject]:
    server = start_server(request.param)
    made = ServerSubject(server)
    yield await made.open()
    await made.close()
    server.kill()


async def test_read_gives_nothing_when_the_cell_is_empty(subject: ServerSubject) -> None:
    _, held = await subject.cache.read([CELL, OTHER])
    assert held == [None, None]


async def test_read_gives_the_exact_bytes_in_order_when_some_are_held(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    raw = b"V\x00\r\n\xff:" + bytes(range(256))
    subject.put(epoch, OTHER, raw)
    assert await subject.cache.read([CELL, OTHER, OTHER]) == (epoch, [None, raw, raw])


async def test_lease_is_fresh_and_expires_when_the_cell_is_empty(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    one, two = await subject.cache.lease(epoch, [CELL, OTHER])
    assert one != two
    assert one[:1] == two[:1] == b"L"
    assert await subject.cache.read([CELL, OTHER]) == (epoch, [one, two])
    assert LEASE_MS - 5_000 < subject.pttl(epoch, CELL) <= LEASE_MS


async def test_lease_is_shared_when_another_process_has_one(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    (theirs,) = await (await subject.process()).lease(epoch, [CELL])
    assert await subject.cache.lease(epoch, [CELL]) == [theirs]


async def test_lease_gives_the_value_when_it_came_in_between(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    subject.put(epoch, CELL, VALUE, ttl_ms=90_000)
    assert await subject.cache.lease(epoch, [CELL]) == [VALUE]
    assert subject.pttl(epoch, CELL) > LEASE_MS, "a value keeps its TTL"


async def test_nothing_is_asked_when_there_are_no_cells(subject: ServerSubject) -> None:
    assert await subject.cache.lease("no epoch at all", []) == []
    await subject.cache.drop([])


async def test_fill_lands_with_its_ttl_when_the_lease_is_held(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    (token,) = await subject.cache.lease(epoch, [CELL])
    assert await subject.cache.fill(epoch, [Fill(CELL, token, VALUE, 90_000)]) == [True]
    assert await (await subject.process()).read([CELL]) == (epoch, [VALUE])
    assert 85_000 < subject.pttl(epoch, CELL) <= 90_000


async def test_fill_lands_when_the_replaced_value_is_the_token(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    subject.put(epoch, CELL, VALUE, ttl_ms=1_000_000)
    assert await subject.cache.fill(epoch, [Fill(CELL, VALUE, NEWER, 50_000)]) == [True]
    assert await subject.cache.read([CELL]) == (epoch, [NEWER])
    assert subject.pttl(epoch, CELL) <= 50_000


@pytest.mark.parametrize("how", ["dropped", "flushed", "expired"])
async def test_fill_is_refused_when_the_token_is_gone(subject: ServerSubject, how: str) -> None:
    epoch, _ = await subject.cache.read([CELL])
    (token,) = await subject.cache.lease(epoch, [CELL])
    if how == "dropped":
        await (await subject.process()).drop([CELL])
    elif how == "flushed":
        subject.flush()
    else:
        subject.expire(epoch, CELL)
    assert await subject.cache.fill(epoch, [Fill(CELL, token, VALUE, 90_000)]) == [False]
    assert await subject.cache.read([CELL]) == (epoch, [None])


async def test_fill_is_refused_when_a_newer_lease_stands(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    (token,) = await subject.cache.lease(epoch, [CELL])
    other = await subject.process()
    await other.drop([CELL])
    (newer,) = await other.lease(epoch, [CELL])
    assert await subject.cache.fill(epoch, [Fill(CELL, token, VALUE, 90_000)]) == [False]
    assert await subject.cache.read([CELL]) == (epoch, [newer])


async def test_fill_is_refused_when_the_token_was_used(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    (token,) = await subject.cache.lease(epoch, [CELL])
    assert await (await subject.process()).fill(epoch, [Fill(CELL, token, VALUE, 90_000)]) == [True]
    assert await subject.cache.fill(epoch, [Fill(CELL, token, NEWER, 90_000)]) == [False]
    assert await subject.cache.read([CELL]) == (epoch, [VALUE])


async def test_fill_is_refused_when_the_value_to_replace_changed(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    subject.put(epoch, CELL, NEWER)
    assert await subject.cache.fill(epoch, [Fill(CELL, VALUE, VALUE + b"0", 90_000)]) == [False]
    assert await subject.cache.read([CELL]) == (epoch, [NEWER])


async def test_each_fill_is_judged_alone_when_many_go_together(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    cells = [Cell(f"user {number}", "f") for number in range(6)]
    tokens = await subject.cache.lease(epoch, cells)
    await (await subject.process()).drop(cells[::2])
    fills = [Fill(cell, token, VALUE, 90_000) for cell, token in zip(cells, tokens, strict=True)]
    assert await subject.cache.fill(epoch, fills) == [False, True] * 3
    assert await subject.cache.read(cells) == (epoch, [None, VALUE] * 3)


async def test_drop_takes_values_and_leases_when_they_are_held(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    third = Cell("cid", "f")
    subject.put(epoch, CELL, VALUE)
    subject.put(epoch, third, VALUE)
    await subject.cache.lease(epoch, [OTHER])
    await (await subject.process()).drop({CELL, OTHER, Cell("unknown", "f")})
    assert await subject.cache.read([CELL, OTHER, third]) == (epoch, [None, None, VALUE])


async def test_drop_exactly_spares_what_changed(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    subject.put(epoch, CELL, VALUE)
    subject.put(epoch, OTHER, NEWER)
    gone = Cell("gone", "f")
    assert await subject.cache.drop_exactly(epoch, [(CELL, VALUE), (OTHER, VALUE), (gone, VALUE)]) == 1
    assert await subject.cache.read([CELL, OTHER, gone]) == (epoch, [None, NEWER, None])


async def test_ids_are_kept_apart_when_they_are_odd(subject: ServerSubject) -> None:
    cells = [Cell(user_id, feature) for user_id in ODD_IDS for feature in ("f", "g")]
    epoch, _ = await subject.cache.read(cells)
    tokens = await subject.cache.lease(epoch, cells)
    assert len(set(tokens)) == len(cells)
    values = [b"V:%d" % number for number in range(len(cells))]
    fills = [Fill(*parts, 90_000) for parts in zip(cells, tokens, values, strict=True)]
    assert all(await subject.cache.fill(epoch, fills))
    assert await (await subject.process()).read(cells) == (epoch, values)
    await subject.cache.drop(cells[:4])
    assert await subject.cache.read(cells) == (epoch, [None] * 4 + values[4:])


@pytest.mark.slow
async def test_thousands_of_cells_keep_their_values(subject: ServerSubject) -> None:
    cells = [Cell(f"user {number}", "f") for number in range(3_000)]
    epoch, held = await subject.cache.read(cells)
    assert held == [None] * len(cells)
    tokens = await subject.cache.lease(epoch, cells)
    values = [b"V:%d" % number for number in range(len(cells))]
    fills = [Fill(*parts, 90_000) for parts in zip(cells, tokens, values, strict=True)]
    assert all(await subject.cache.fill(epoch, fills))
    assert await subject.cache.read(cells) == (epoch, values)
    assert await subject.cache.drop_exactly(epoch, list(zip(cells[:2_000], values[:2_000], strict=True))) == 2_000
    await subject.cache.drop(cells)
    assert await subject.cache.read(cells) == (epoch, [None] * len(cells))


async def test_processes_share_an_epoch_when_they_share_a_database(subject: ServerSubject) -> None:
    epoch, _ = await subject.cache.read([CELL])
    subject.put(epoch, CELL, VALUE)
    assert await (await subject.process()).read([CELL]) == (epoch, [VALUE])
    elsewhere, held = await (await subject.process("a restored backup")).read([CELL])
    assert elsewhere != epoch
    assert held == [None]


async def test_restarted_server_serves_no_old_value(restartable: ServerSubject) -> None:
    epoch, _ = await restartable.cache.read([CELL])
    restartable.put(epoch, CELL, VALUE)
    (token,) = await restartable.cache.lease(epoch, [OTHER])
    restartable.restart()
    with suppress(CacheUnavailable):  # the old connection may break only now
        await restartable.cache.drop([CELL])
    with pytest.raises(CacheRefused):
        await restartable.cache.lease(epoch, [OTHER])
    with pytest.raises(CacheRefused):
        await restartable.cache.fill(epoch, [Fill(OTHER, token, VALUE, 90_000)])
    with pytest.raises(CacheRefused):
        await restartable.cache.drop_exactly(epoch, [(CELL, VALUE)])
    await restartable.cache.open()
    next_epoch, held = await restartable.cache.read([CELL, OTHER])
    assert next_epoch != epoch
    assert held == [None, None]
    await restartable.cache.drop([CELL])
    assert restartable.pttl(epoch, CELL) > 0, "the old key is out of reach for drops as well"
