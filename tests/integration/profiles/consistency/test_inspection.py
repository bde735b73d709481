"""A look at a user tells what the cache held and what a computation gives, and changes neither."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

import pytest

from app.features.clock import DAY_MS
from app.features.registry import Registry
from app.profiles.consistency.inspection import Inspection, Inspector
from app.profiles.online.cache_protocol import LEASE, FeatureValue, Filler, encode
from app.profiles.ports import UNAVAILABLE, Cell
from app.stores.valkey.cache import key
from app.telemetry import Metrics
from tests.support.clock import NOW_MS, no_pause
from tests.support.entries import entry
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

VOLUME = REGISTRY.names.index("tip_volume_30d")


async def _never(_: float) -> None:
    raise AssertionError("a pause")


def inspector(service: PausableService, pause: Callable[[float], Awaitable[None]] = no_pause) -> Inspector:
    return Inspector(
        filler=Filler(service.cache, service.registry, Metrics()),
        distrusted=service.inner.reader.gate.distrusted,
        users=service.inner.users,
        computation=service.computation,
        pause=pause,
    )


async def inspect(service: PausableService, pause: Callable[[float], Awaitable[None]] = no_pause) -> Inspection:
    (inspection,) = await inspector(service, pause).inspect(["ann"])
    return inspection


async def put_raw(service: PausableService, group: ServiceGroup, feature: str, raw: bytes) -> None:
    """Put bytes past the protocol."""
    epoch, _ = await service.cache.inner.read([Cell("ann", feature)])
    ask(group.server, "SET", key(epoch, Cell("ann", feature)), raw)


async def put(
    service: PausableService, group: ServiceGroup, feature: str, seq: int, text: bytes, fingerprint: bytes = b""
) -> None:
    """Put a value past the protocol."""
    known = fingerprint or service.registry.named(feature).fingerprint.encode()
    now_ms = service.clock.now_ms()
    await put_raw(service, group, feature, encode(FeatureValue(known, seq, now_ms, now_ms + 60_000, text)))


def by_name(inspection: Inspection, what: str) -> dict[str, object]:
    return {cell.entry.name: getattr(cell, what) for cell in inspection.cells}


async def test_inspection_changes_nothing(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"), feedback("ann", dwell_ms=7))
    keys = ask(group.server, "DBSIZE")
    first, second = [await inspect(service) for _ in range(2)]
    assert set(by_name(first, "state").values()) == set(by_name(second, "state").values()) == {"missing"}
    assert set(by_name(second, "holds").values()) == {"nothing"}
    assert ask(group.server, "DBSIZE") == keys
    expected = await service.features("ann")
    for index, cell in enumerate(first.cells):
        reading = first.reading(index)
        assert json.loads(reading.json) == json.loads(cell.outcome.json) == expected[cell.entry.name]
        assert (reading.cached, reading.expires_at_ms, cell.difference) == (False, None, None)


async def test_each_cell_has_its_own_state(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await service.features("ann")
    await service.drain()
    await put(service, group, "tip_volume_30d", 0, b"0")
    await put(service, group, "mean_dwell_ms_30d", 1, b"null", fingerprint=b"another")
    await put_raw(service, group, "dismiss_rate_30d", LEASE + b"nonce")
    await service.cache.inner.drop([Cell("ann", "preferred_hour")])
    inspection = await inspect(service)
    assert inspection.cache == "trusted"
    assert by_name(inspection, "state") == {
        "completion_rate_30d": "fresh",
        "dismiss_rate_30d": "missing",
        "mean_dwell_ms_30d": "missing",
        "preferred_hour": "missing",
        "tip_volume_30d": "stale",
    }
    assert by_name(inspection, "holds") == {
        "completion_rate_30d": "value",
        "dismiss_rate_30d": "lease",
        "mean_dwell_ms_30d": "other definition",
        "preferred_hour": "nothing",
        "tip_volume_30d": "value",
    }
    assert by_name(inspection, "difference") == {
        **dict.fromkeys(REGISTRY.names),
        "completion_rate_30d": "none",
        "tip_volume_30d": "stale",
    }
    held = inspection.cells[VOLUME].held
    assert held is not None
    assert (held.json, held.version, inspection.cells[VOLUME].outcome.json) == (b"0", 0, b"1")
    assert inspection.reading(VOLUME).json == b"0"  # a read would have answered that


async def test_only_events_of_its_subjects_make_a_cell_stale(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, "completion_rate_30d", 0, b"null")
    assert by_name(await inspect(service), "state")["completion_rate_30d"] == "fresh"


async def test_value_is_expired_when_its_oldest_event_has_left_the_window(service: PausableService) -> None:
    await service.send(served("ann", NOW_MS - 30 * DAY_MS + 60_000), served("ann", NOW_MS))
    await service.features("ann")
    await service.drain()
    service.clock.step_to(NOW_MS + 59_999)
    cell = (await inspect(service, _never)).cells[VOLUME]
    assert cell.held is not None
    assert (cell.state, cell.held.json, cell.outcome.json, cell.difference) == ("fresh", b"2", b"2", "none")
    service.clock.step_to(NOW_MS + 60_000)
    cell = (await inspect(service, _never)).cells[VOLUME]
    assert (cell.state, cell.holds, cell.held, cell.outcome.json) == ("missing", "expired", None, b"1")


@pytest.mark.parametrize(("text", "difference"), [(b"1", "none"), (b"3", "unexplained")])
async def test_value_computed_by_a_clock_ahead_is_compared_when_its_time_has_come(
    service: PausableService, group: ServiceGroup, text: bytes, difference: str
) -> None:
    await service.send(served("ann", NOW_MS - 30 * DAY_MS + 500), served("ann", NOW_MS))
    service.clock.step_to(NOW_MS + 900)
    await put(service, group, "tip_volume_30d", 2, text)
    service.clock.step_to(NOW_MS)
    cell = (await inspect(service)).cells[VOLUME]
    assert (cell.state, cell.outcome.json, cell.difference) == ("fresh", b"2", None)
    service.clock.step_to(NOW_MS + 900)
    cell = (await inspect(service)).cells[VOLUME]
    assert (cell.state, cell.outcome.json, cell.difference) == ("fresh", b"1", difference)


@pytest.mark.parametrize(("seq", "state"), [(1, "stale"), (2, "fresh")])
async def test_value_computed_by_a_clock_ahead_is_judged_by_its_version(
    service: PausableService, group: ServiceGroup, seq: int, state: str
) -> None:
    await service.send(served("ann"), served("ann"))
    service.clock.step_to(NOW_MS + 900)
    await put(service, group, "tip_volume_30d", seq, b"1")
    service.clock.step_to(NOW_MS)
    cell = (await inspect(service)).cells[VOLUME]
    assert (cell.state, cell.difference) == (state, None)


async def test_difference_is_unexplained_without_event_or_time(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, "tip_volume_30d", 1, b"77")
    cell = (await inspect(service)).cells[VOLUME]
    assert (cell.state, cell.difference) == ("fresh", "unexplained")


@pytest.mark.parametrize(("seq", "text"), [(0, b"0"), (1, b"77")], ids=["stale", "unexplained"])
async def test_value_deleted_before_the_recheck_is_no_fault(
    service: PausableService, group: ServiceGroup, seq: int, text: bytes
) -> None:
    await service.send(served("ann"))
    await put(service, group, "tip_volume_30d", seq, text)
    pauses: list[float] = []

    async def drop(seconds: float) -> None:
        pauses.append(seconds)
        await service.cache.inner.drop([Cell("ann", "tip_volume_30d")])

    cell = (await inspect(service, drop)).cells[VOLUME]
    assert (cell.state, cell.difference, len(pauses)) == ("missing", None, 1)


async def test_value_replaced_before_the_recheck_is_no_fault(service: PausableService, group: ServiceGroup) -> None:
    pauses: list[float] = []

    async def one_more(seconds: float) -> None:
        pauses.append(seconds)
        await put(service, group, "tip_volume_30d", 0, b"%d" % len(pauses))

    await service.send(served("ann"))
    await put(service, group, "tip_volume_30d", 0, b"0")
    cell = (await inspect(service, one_more)).cells[VOLUME]
    assert len(pauses) == 1
    assert (cell.state, cell.held, cell.difference) == ("missing", None, None)


async def test_event_during_an_inspection_explains_its_difference(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann"))
    await service.features("ann")
    await service.drain()
    # The cells are read; then an event is committed, and its DEL comes before the second look.
    looking = await group.stopped_at(service.source.before, inspect(service))
    await (await group.open()).send(served("ann"))
    service.go()
    cell = (await looking).cells[VOLUME]
    assert (cell.state, cell.held, cell.outcome.json, cell.difference) == ("missing", None, b"2", None)


async def test_no_difference_is_reported_when_computing_fails(group: ServiceGroup) -> None:
    broken = entry(compute="SELECT user_id, 'text' AS value FROM views GROUP BY user_id", ttl=timedelta(hours=1))
    service = await group.open(Registry([broken]))
    await service.send(served("ann"))
    await put(service, group, "probe", 1, b"5")
    (cell,) = (await inspect(service)).cells
    assert (cell.state, cell.difference) == ("fresh", None)
    assert cell.outcome.error is not None


async def test_cells_are_unknown_when_the_cache_is_unreachable(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    await service.features("ann")
    await service.drain()
    fragile_world.server.kill()
    inspection = await inspect(service)
    assert inspection.cache == "away"
    assert set(by_name(inspection, "state").values()) == {None}
    assert set(by_name(inspection, "difference").values()) == {None}
    assert inspection.reading(VOLUME).json == b"1"


async def test_cells_are_unknown_when_the_cache_fails_on_recheck(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    await put(service, fragile_world, "tip_volume_30d", 0, b"0")

    async def kill(_: float) -> None:
        fragile_world.server.kill()

    inspection = await inspect(service, kill)
    assert (inspection.cache, inspection.cells[VOLUME].state) == ("away", None)
    assert inspection.reading(VOLUME).json == b"1"


async def test_values_are_unknown_when_the_node_of_the_user_is_unreachable(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(cells: Sequence[Cell]) -> tuple[str, list[bytes]]:
        return "", [UNAVAILABLE] * len(cells)

    monkeypatch.setattr(service.cache, "read", read)
    (uncomputed,) = await inspector(service).inspect(["ann"], compute=False)
    assert uncomputed.cache == "away"
    assert (await inspect(service)).cache == "away"


async def test_value_of_a_version_that_does_not_exist_is_judged(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, "tip_volume_30d", 99, b"77")
    cell = (await inspect(service)).cells[VOLUME]
    assert (cell.state, cell.difference) == ("fresh", "unexplained")


async def test_cache_is_not_trusted_when_an_invalidation_is_owed(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await put(service, group, "tip_volume_30d", 1, b"77")
    await service.owed.owe(["bob"], NOW_MS)
    service.clock.advance(1_000)
    assert (await inspect(service)).cache == "trusted", "reads serve hits of users without an owed invalidation"
    await service.owed.owe(["ann"], NOW_MS)
    service.clock.advance(1_000)
    inspection = await inspect(service)
    assert (inspection.cache, inspection.cells[VOLUME].state) == ("owed", "fresh")
    assert inspection.reading(VOLUME).json == b"1"


# --- freshness, without a computation


async def put_of(service: PausableService, group: ServiceGroup, user: str, seq: int, fingerprint: bytes = b"") -> None:
    """Put a volume of another user past the protocol."""
    known = fingerprint or service.registry[VOLUME].fingerprint.encode()
    now_ms = service.clock.now_ms()
    cell = Cell(user, "tip_volume_30d")
    epoch, _ = await service.cache.inner.read([cell])
    ask(group.server, "SET", key(epoch, cell), encode(FeatureValue(known, seq, now_ms, now_ms + 60_000, b"1")))


async def test_freshness_of_many_users_is_counted(service: PausableService, group: ServiceGroup) -> None:
    users = ["ann", "bob", "cyd", "dee"]
    await service.send(*map(served, users), feedback("ann"))
    await service.batch(["ann", "bob"])
    await service.drain()
    await put_of(service, group, "cyd", seq=1)
    await put_of(service, group, "dee", seq=99, fingerprint=b"another")
    statements = len(service.source.statements)
    looks = await inspector(service).inspect(users, compute=False)
    assert len(service.source.statements) == statements
    assert [(look.user_id, [cell.feature for cell in look.cells]) for look in looks] == [
        (user, list(range(len(REGISTRY)))) for user in users
    ]
    assert all((cell.held is None) == (cell.state == "missing") for look in looks for cell in look.cells)
    volumes = [look.cells[VOLUME] for look in looks]
    assert [cell.state for cell in volumes] == ["fresh", "fresh", "stale", "missing"]
    assert [cell.held.json for cell in volumes if cell.held] == [b"1", b"1", b"1"]


async def test_only_the_features_asked_for_are_read(service: PausableService) -> None:
    looks = await inspector(service).inspect(["ann"], REGISTRY.mask(["preferred_hour"]), compute=False)
    assert [(cell.feature, cell.state) for look in looks for cell in look.cells] == [(3, "missing")]


async def test_cache_is_not_asked_when_there_is_no_user(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(cells: Sequence[Cell]) -> None:
        raise AssertionError("a command without keys, which servers refuse")

    monkeypatch.setattr(service.cache, "read", read)
    assert await inspector(service).inspect([], compute=False) == []


async def test_freshness_is_unknown_when_the_cache_is_unreachable(fragile_world: ServiceGroup) -> None:
    service = await fragile_world.open()
    await service.send(served("ann"))
    fragile_world.server.kill()
    (look,) = await inspector(service).inspect(["ann"], compute=False)
    assert look.cache == "away"
