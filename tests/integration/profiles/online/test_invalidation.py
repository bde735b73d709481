"""Invalidation: made at once, or owed, waited for and settled; and what comes out in two processes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import NamedTuple

import pytest

from app.errors import StoreUnavailable
from app.profiles.online.cache_protocol import HOLD_BACK_S, FeatureValue, encode
from app.profiles.online.invalidation import SETTLE_CHUNK
from app.profiles.ports import Cell, Fill
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.database import column
from tests.support.events import feedback, served
from tests.support.proxy import Proxy, proxy
from tests.support.registry import REGISTRY
from tests.support.servers import ask, keys
from tests.support.service import TIMEOUT_MS, PausableService, assert_reads, assert_true
from tests.support.service_group import ServiceGroup
from tests.support.waiting import eventually

pytestmark = pytest.mark.both_engines

USER = "ann"
PAUSED_MS = 1_000  # the timeout where the server is silent: each command waits for it


async def owed(service: PausableService) -> list[object]:
    """The users whose invalidation is owed, in order."""
    return await column(service.database, "SELECT user_id FROM owed_invalidations ORDER BY id")


async def test_keys_are_deleted_without_waiting(service: PausableService) -> None:
    await assert_true([service], USER, "bob")
    assert await service.invalidator.invalidate({USER: REGISTRY.names}) is True
    held = await service.held(USER, "bob")
    assert [raw is None for raw in held.values()] == [True] * len(REGISTRY) + [False] * len(REGISTRY)
    assert service.pauses == []
    assert await owed(service) == []


async def test_no_command_is_sent_when_nothing_is_stale(service: PausableService) -> None:
    assert await service.invalidator.invalidate({}) is True
    assert service.cache.commands == {}


def kill(server: EmbeddedServer) -> None:
    server.kill()


def pause(server: EmbeddedServer) -> None:
    server.signal(signal.SIGSTOP)


def make_read_only(server: EmbeddedServer) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", "1")


def unpause(server: EmbeddedServer) -> None:
    server.signal(signal.SIGCONT)


def make_writable(server: EmbeddedServer) -> None:
    ask(server, "REPLICAOF", "NO", "ONE")


def start(server: EmbeddedServer) -> None:
    server.start()


class Outage(NamedTuple):
    begin: Callable[[EmbeddedServer], None]
    end: Callable[[EmbeddedServer], None]
    timeout_ms: int = TIMEOUT_MS


OUTAGES = pytest.mark.parametrize(
    "outage",
    [
        pytest.param(Outage(kill, start), id="killed"),
        pytest.param(Outage(pause, unpause, PAUSED_MS), id="paused", marks=pytest.mark.slow),
        pytest.param(Outage(make_read_only, make_writable), id="read-only"),
    ],
)


@OUTAGES
async def test_owed_row_is_committed_before_the_wait(fragile_world: ServiceGroup, outage: Outage) -> None:
    service = await fragile_world.open(timeout_ms=outage.timeout_ms)
    await assert_true([service], USER)
    during: list[list[object]] = []

    async def wait(seconds: float) -> None:
        assert seconds == HOLD_BACK_S
        during.append(await owed(service))

    service.invalidator.pause = wait
    outage.begin(fragile_world.server)
    assert await service.invalidator.invalidate({USER: REGISTRY.names, "bob": ["tip_volume_30d"]}) is False
    assert during == [[USER, "bob"]]
    assert service.counted("invalidations", outcome="owed") == 2
    outage.end(fragile_world.server)


@OUTAGES
async def test_no_read_is_stale_when_the_cache_returns(fragile_world: ServiceGroup, outage: Outage) -> None:
    one, two = [await fragile_world.open(timeout_ms=outage.timeout_ms) for _ in range(2)]
    await assert_true([one, two], USER)
    outage.begin(fragile_world.server)
    receipt = await one.send(served(USER), feedback(USER))
    assert receipt.invalidated is False
    for service in (one, two):
        assert await service.features(USER) == await service.recomputed(USER)
        assert service.counted("degraded_reads", reason="owed") + service.counted(
            "degraded_reads", reason="unavailable"
        )
    outage.end(fragile_world.server)
    for service in (two, one):  # not settled yet
        assert await service.features(USER) == await service.recomputed(USER)
    await two.reconnected()
    assert await two.invalidator.settle() == 1
    fragile_world.clock.advance(51)
    await one.reconnected()
    await assert_true([one, two], USER)
    await hits_again(two)


@pytest.mark.parametrize("contents", ["none", "old"])
async def test_no_read_is_stale_when_the_cache_restarts(fragile_world: ServiceGroup, contents: str) -> None:
    one, two = [await fragile_world.open() for _ in range(2)]
    await assert_true([one, two], USER)
    dump = fragile_world.save() if contents == "old" else None
    fragile_world.server.kill()
    await one.send(served(USER), feedback(USER))
    fragile_world.restart(dump)
    for service in (two, one):
        assert await service.features(USER) == await service.recomputed(USER)
    await two.reconnected()
    await one.reconnected()
    assert await one.invalidator.settle() == 1
    fragile_world.clock.advance(51)
    await assert_true([one, two], USER)
    await hits_again(one)


async def hits_again(service: PausableService) -> None:
    statements = len(service.source.statements)
    await service.features(USER)
    assert len(service.source.statements) == statements


async def test_no_command_is_sent_when_the_breaker_is_open(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    fragile_world.server.kill()
    for _ in range(3):
        await service.features(USER)
    assert not service.cache.available
    service.cache.commands.clear()
    assert (await service.send(served(USER))).invalidated is False
    assert await service.features(USER) == await service.recomputed(USER)
    assert service.cache.commands == {}


async def test_invalidate_raises_when_neither_cache_nor_database_answer(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    fragile_world.server.kill()
    await service.database.close()
    with pytest.raises(StoreUnavailable):
        await service.invalidator.invalidate({USER: REGISTRY.names})


async def one_process_cut_off(
    group: ServiceGroup, lose: Callable[[Proxy], None] = Proxy.cut, timeout_ms: int = TIMEOUT_MS
) -> None:
    """An event comes in by the process that cannot reach the cache; the one that can must not serve a hit."""
    async with proxy(group.server.socket_path) as line:
        near, far = await group.open(), await group.open(url=line.url, timeout_ms=timeout_ms)
        await assert_true([near, far], USER)
        lose(line)
        assert (await far.send(served(USER), feedback(USER))).invalidated is False
        assert await near.features(USER) == await near.recomputed(USER), "differs from a recomputation"
        assert await far.features(USER) == await far.recomputed(USER)
        assert near.counted("degraded_reads", reason="owed") == 1
        assert await near.invalidator.settle() == 1
        group.clock.advance(51)
        await assert_true([near], USER)
        await assert_reads([far], USER)
        await hits_again(near)
        line.mend()
        await far.reconnected()
        await assert_true([far, near], USER)
        await hits_again(far)


async def test_other_process_is_right_when_one_is_cut_off(group: ServiceGroup) -> None:
    await one_process_cut_off(group)


@pytest.mark.slow
async def test_other_process_is_right_when_one_gets_no_answers(group: ServiceGroup) -> None:
    await one_process_cut_off(group, Proxy.silence, PAUSED_MS)


async def test_stale_read_is_found_when_the_gate_always_trusts(
    group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.profiles.online.cache_protocol.TrustGate.check", lambda gate: frozenset())
    with pytest.raises(AssertionError, match="differs from a recomputation"):
        await one_process_cut_off(group)


async def test_stale_read_is_found_without_the_hold_back(group: ServiceGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.profiles.online.invalidation.HOLD_BACK_S", 0)
    with pytest.raises(AssertionError, match="differs from a recomputation"):
        await one_process_cut_off(group)


async def test_owed_row_stays_when_an_older_one_is_settled(group: ServiceGroup) -> None:
    one, two = await group.open(), await group.open()
    await two.owed.owe([USER, "bob"], 1)
    settling = await group.stopped_at(one.cache.before_drop, one.invalidator.settle())
    await two.owed.owe([USER], 2)
    one.cache.before_drop.go()
    # It is found by the next look of the same settling, and the keys are dropped again.
    assert await settling == 3
    assert one.cache.commands["drop"] == 2


async def test_owed_row_recorded_after_the_drop_is_settled_apart(
    group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await group.open(), await group.open()
    await two.owed.owe([USER], 1)
    left: list[list[object]] = []
    settled = one.owed.settled

    async def late(ids: list[int]) -> None:
        await two.owed.owe([USER], 2)
        await settled(ids)
        left.append(await owed(one))

    monkeypatch.setattr(one.owed, "settled", late)
    settling = asyncio.get_running_loop().create_task(one.invalidator.settle())
    await eventually(lambda: left)
    monkeypatch.setattr(one.owed, "settled", settled)
    await settling
    assert left[0] == [USER]
    assert await owed(one) == []


async def test_all_owed_rows_are_settled_when_there_are_many(service: PausableService) -> None:
    users = [f"user {number}" for number in range(SETTLE_CHUNK * 2 + 7)]
    await service.batch(users)
    await service.drain()
    await service.owed.owe(users, 1)
    service.clock.advance(51)
    assert await service.inner.reader.gate.distrusted()
    assert await service.invalidator.settle() == len(users)
    assert await owed(service) == []
    assert service.cache.commands["drop"] == 3
    assert set((await service.held(*users)).values()) == {None}


async def test_keys_of_another_release_are_settled_too(group: ServiceGroup) -> None:
    """The one that settles need not know the feature; what any process announced is dropped."""
    service = await group.open()
    await service.database.write(
        lambda connection: connection.execute(
            "INSERT INTO feature_keys VALUES ('signals.tip.served', 'of_tomorrow', 1)"
        ),
        of=(),
    )
    epoch, _ = await service.cache.read([Cell(USER, "of_tomorrow")])
    await service.cache.lease(epoch, [Cell(USER, "of_tomorrow")])
    await service.owed.owe([USER], 1)
    await service.invalidator.settle()
    assert keys(group.server) == []


async def test_only_older_values_are_deleted_when_an_event_is_consumed(service: PausableService) -> None:
    cells = {name: Cell(USER, name) for name in ("old", "same", "newer", "lease", "garbage", "empty")}
    epoch, _ = await service.cache.read(list(cells.values()))
    tokens = dict(zip(cells, await service.cache.lease(epoch, list(cells.values())), strict=True))
    stand = {
        "old": encode(FeatureValue(b"f", 6, 1, 2, b"3")),
        "same": encode(FeatureValue(b"f", 7, 1, 2, b"3")),
        "newer": encode(FeatureValue(b"f", 8, 1, 2, b"3")),
        "garbage": b"garbage",
    }
    await service.cache.fill(epoch, [Fill(cells[name], tokens[name], raw, 60_000) for name, raw in stand.items()])
    await service.cache.drop([cells["empty"]])
    await service.invalidator.drop_older({USER: dict.fromkeys(cells, 7)})
    _, held = await service.cache.read(list(cells.values()))
    assert dict(zip(cells, held, strict=True)) == {**stand, "old": None, "lease": tokens["lease"], "empty": None}
    assert service.counted("stale_values_dropped") == 1


async def test_no_command_is_sent_when_no_event_is_consumed(service: PausableService) -> None:
    await service.invalidator.drop_older({})
    assert service.cache.commands == {}


class Books:
    def __init__(self) -> None:
        self.debts = False
        self.failing = False
        self.looks = 0

    async def any_owed(self) -> bool:
        self.looks += 1
        if self.failing:
            raise StoreUnavailable("locked")
        return self.debts


async def test_settling_continues_after_failures(fragile_world: ServiceGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await fragile_world.open()
    await assert_true([service], USER)
    make_read_only(fragile_world.server)
    await service.send(served(USER))
    keeping = await fragile_world.started(service.invalidator.keep_settling())
    books, any_owed = Books(), service.owed.any_owed
    books.failing = True
    monkeypatch.setattr(service.owed, "any_owed", books.any_owed)
    await eventually(lambda: books.looks > 2)
    monkeypatch.setattr(service.owed, "any_owed", any_owed)
    make_writable(fragile_world.server)
    await eventually(lambda: service.metrics.collectors.get_sample_value("profiles_owed_invalidations") == 0)
    assert not await any_owed()
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_gauge_is_the_number_of_owed_invalidations(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.owed.owe(["ann", "bob", "cid"], 1)
    fragile_world.server.kill()
    assert (await service.inner.refresh_gauges()).owed == 3
    service.pauses.clear()
    keeping = await fragile_world.started(service.invalidator.keep_settling())
    await eventually(lambda: len(service.pauses) > 2)  # each attempt to settle has failed
    assert service.metrics.collectors.get_sample_value("profiles_owed_invalidations") == 3
    keeping.cancel()


async def test_gauge_falls_when_another_process_settled(group: ServiceGroup) -> None:
    one, two = await group.open(), await group.open()
    await one.owed.owe([USER], 1)
    one.metrics.owed.set(1)
    await two.invalidator.settle()
    keeping = await group.started(one.invalidator.keep_settling())
    await eventually(lambda: one.metrics.collectors.get_sample_value("profiles_owed_invalidations") == 0)
    keeping.cancel()


async def test_settling_ends_when_cancelled_in_its_wait(service: PausableService, group: ServiceGroup) -> None:
    keeping = await group.started(service.invalidator.keep_settling())
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_settling_ends_when_cancelled_in_its_pause(
    service: PausableService, group: ServiceGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = asyncio.Event()

    async def forever(_: float) -> None:
        paused.set()
        await asyncio.get_running_loop().create_future()

    books = Books()
    books.failing = True
    monkeypatch.setattr(service.owed, "any_owed", books.any_owed)
    service.invalidator.pause = forever
    keeping = await group.started(service.invalidator.keep_settling())
    await eventually(paused.is_set)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_owed_row_is_kept_when_cancelled_before_the_drop(service: PausableService, group: ServiceGroup) -> None:
    await service.owed.owe([USER], 1)
    keeping = await group.stopped_at(service.cache.before_drop, service.invalidator.keep_settling())
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    assert await owed(service) == [USER]
