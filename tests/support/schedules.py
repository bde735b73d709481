"""The forced schedules: one coroutine per interleaving that the protocol must survive.

Each sets processes going, stops them where its docstring says, and ends with `assert_true`: reads in every process
equal a recomputation, and no wrong value stands in the cache. What a schedule asserts besides comes after that, so that
a mutant fails by the wrong read and not by an implementation detail.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from app.features.registry import Registry
from app.profiles.online.cache_protocol import LEASE
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.servers import ask, keys
from tests.support.service import PausableService, assert_true
from tests.support.service_group import CONSTANT_EPOCH, PLAIN_SET, SAME_NONCE, Kind, ServiceGroup
from tests.support.waiting import eventually

Schedule = Callable[[ServiceGroup], Awaitable[None]]
USER = "ann"

on_shared_server: list[Schedule] = []
on_own_server: list[Schedule] = []
caught: list[tuple[Schedule, Kind]] = []


def schedule(*mutants: Kind, own_server: bool = False) -> Callable[[Schedule], Schedule]:
    """Registers a schedule, and the mutants that it must catch."""

    def register(run: Schedule) -> Schedule:
        (on_own_server if own_server else on_shared_server).append(run)
        caught.extend((run, kind) for kind in mutants)
        return run

    return register


def refused(service: PausableService) -> float:
    """Fills of a process that did not land because their token was gone."""
    return service.counted("cache_fills", outcome="refused")


@schedule(PLAIN_SET)
async def fill_after_del(group: ServiceGroup) -> None:
    """R token, R snapshot, E commit, E DEL, E answer, R fill."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    await writer.send(served(USER), feedback(USER))
    reader.source.after.go()
    await reading
    await assert_true([reader, writer], USER)
    assert refused(reader) == len(REGISTRY)


@schedule(PLAIN_SET, SAME_NONCE)
async def fill_after_del_and_a_new_lease(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, E commit, E DEL, R2 token, R1 fill, R3 read, R2 snapshot, R2 fill."""
    first, second, third = await group.open(), await group.open(), await group.open()
    reading = await group.stopped_at(first.source.after, first.features(USER))
    await third.send(served(USER), feedback(USER))
    other = await group.stopped_at(second.source.before, second.features(USER))
    first.source.after.go()
    await reading
    await first.drain()
    await assert_true([third], USER)
    second.source.before.go()
    assert await other == await second.recomputed(USER)
    await assert_true([first, second, third], USER)
    assert refused(first) == len(REGISTRY)


@schedule(PLAIN_SET)
async def fill_after_an_erasure(group: ServiceGroup) -> None:
    """E commit, R1 token (a value without E), R1 snapshot, E DEL, E answer, erasure, R2 fill, R1 fill. Without an event
    before and after, R2 computes what R1's token is, at the same time and with the same TTL."""
    first, writer, rebuilder = await group.open(), await group.open(), await group.open()
    await first.features(USER)
    await first.drain()
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    rebuilding = await group.stopped_at(rebuilder.source.after, rebuilder.rebuild(USER))
    writer.cache.before_drop.go()
    await sending
    await writer.erase(USER)
    second = await group.open()
    await second.features(USER)
    await second.drain()
    rebuilder.source.after.go()
    await rebuilding
    await assert_true([first, writer, rebuilder, second], USER)
    assert refused(rebuilder) >= len(REGISTRY)


@schedule(PLAIN_SET)
async def fill_after_flushall(group: ServiceGroup) -> None:
    """R token, R snapshot, E commit, E DEL, FLUSHALL, R fill: a design with a version counter would lose it here."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    await writer.send(served(USER))
    ask(group.server, "FLUSHALL")
    reader.source.after.go()
    await reading
    await assert_true([reader, writer], USER)
    assert refused(reader) == len(REGISTRY)


@schedule(PLAIN_SET, SAME_NONCE)
async def fill_after_flushall_and_a_new_lease(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, E commit, E DEL, FLUSHALL, R2 token, R1 fill, R3 read."""
    first, second, third = await group.open(), await group.open(), await group.open()
    reading = await group.stopped_at(first.source.after, first.features(USER))
    await third.send(feedback(USER))
    ask(group.server, "FLUSHALL")
    other = await group.stopped_at(second.source.before, second.features(USER))
    first.source.after.go()
    await reading
    await first.drain()
    await assert_true([third], USER)
    second.source.before.go()
    await other
    await assert_true([first, second, third], USER)


@schedule()
async def fill_after_flushall_without_an_event(group: ServiceGroup) -> None:
    """R token, R snapshot, FLUSHALL, R fill: refused, and nothing is lost but the fill."""
    reader = await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    ask(group.server, "FLUSHALL")
    reader.source.after.go()
    await reading
    await reader.drain()
    assert keys(group.server) == []
    await assert_true([reader], USER)


@schedule(PLAIN_SET)
async def fill_after_the_lease_expired(group: ServiceGroup) -> None:
    """R token, R snapshot, the lease expires, E commit, E DEL, R fill."""
    reader, writer = await group.open(lease_ms=5), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    await eventually(lambda: keys(group.server) == [])
    await writer.send(served(USER))
    reader.source.after.go()
    await reading
    await assert_true([reader, writer], USER)
    assert refused(reader) >= len(REGISTRY), "and more, where a later lease expired before its fill"


@schedule()
async def two_processes_share_a_token(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, E commit, R2 shares the token, R2 snapshot, R2 fill, R1 fill, E DEL."""
    first, second, writer = await group.open(), await group.open(), await group.open()
    reading = await group.stopped_at(first.source.after, first.features(USER))
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    assert await second.features(USER) == await second.recomputed(USER)
    await second.drain()
    assert second.counted("cache_fills", outcome="stored") == len(REGISTRY)
    first.source.after.go()
    await reading
    await first.drain()
    writer.cache.before_drop.go()
    await sending
    await assert_true([first, second, writer], USER)
    assert refused(first) == len(REGISTRY)


@schedule()
async def two_processes_share_a_token_and_the_older_fill_lands(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, E commit, R2 shares the token, R2 snapshot, R1 fill, R2 fill, E DEL."""
    first, second, writer = await group.open(), await group.open(), await group.open()
    reading = await group.stopped_at(first.source.after, first.features(USER))
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    other = await group.stopped_at(second.source.after, second.features(USER))
    first.source.after.go()
    await reading
    await first.drain()
    second.source.after.go()
    assert await other == await second.recomputed(USER)
    await second.drain()
    assert not sending.done(), "nobody was told of the event while the older value stood"
    writer.cache.before_drop.go()
    await sending
    await assert_true([first, second, writer], USER)
    assert (refused(first), refused(second)) == (0, len(REGISTRY))


@schedule()
async def two_reads_of_one_process_share_a_token(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, R2 the same token, R2 snapshot, R1 fill, R2 fill: the second fill finds no token."""
    reader = await group.open()
    one = await group.stopped_at(reader.source.after, reader.features(USER))
    two = await group.started(reader.features(USER))
    await eventually(lambda: len(reader.source.statements) == 2)
    reader.source.after.go()
    assert await one == await two
    await assert_true([reader], USER)
    assert refused(reader) == len(REGISTRY)


@schedule()
async def an_event_parts_two_reads_of_one_process(group: ServiceGroup) -> None:
    """R1 token, R1 snapshot, E commit, E DEL, E answer, R2 reads: it may not join."""
    reader, writer = await group.open(), await group.open()
    one = await group.stopped_at(reader.source.after, reader.features(USER))
    await writer.send(served(USER))
    two = await group.started(reader.features(USER))
    await eventually(lambda: len(reader.source.statements) == 2)
    reader.source.after.go()
    assert await two == await reader.recomputed(USER)
    await one
    await assert_true([reader, writer], USER)


@schedule(PLAIN_SET)
async def rebuild_overtakes_a_running_miss(group: ServiceGroup) -> None:
    """R token, R snapshot, E commit, E DEL, B (rebuild) token, snapshot and fill, R fill."""
    reader, rebuilder = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    await rebuilder.send(served(USER), feedback(USER, action="dismissed"))
    rebuilt = await rebuilder.rebuild(USER)
    reader.source.after.go()
    await reading
    await assert_true([reader, rebuilder], USER)
    assert rebuilt[USER] == await rebuilder.recomputed(USER)
    assert refused(reader) == len(REGISTRY)


@schedule(PLAIN_SET)
async def a_miss_overtakes_a_running_rebuild(group: ServiceGroup) -> None:
    """A value held, B token, B snapshot, E commit, E DEL, R token, R snapshot, R fill, B fill: made anew."""
    reader, rebuilder = await group.open(), await group.open()
    await assert_true([reader], USER)
    rebuilding = await group.stopped_at(rebuilder.source.after, rebuilder.rebuild(USER))
    await reader.send(served(USER), feedback(USER))
    await assert_true([reader], USER)
    rebuilder.source.after.go()
    rebuilt = await rebuilding
    await assert_true([reader, rebuilder], USER)
    assert rebuilt[USER] == await rebuilder.recomputed(USER)
    assert refused(rebuilder) == len(REGISTRY)


@schedule(PLAIN_SET)
async def an_event_meets_a_running_rebuild(group: ServiceGroup) -> None:
    """B token (a lease), B snapshot, E commit, E DEL, B fill: refused and made anew."""
    reader, rebuilder = await group.open(), await group.open()
    rebuilding = await group.stopped_at(rebuilder.source.after, rebuilder.rebuild(USER))
    await reader.send(served(USER))
    rebuilder.source.after.go()
    rebuilt = await rebuilding
    await assert_true([reader, rebuilder], USER)
    assert rebuilt[USER] == await rebuilder.recomputed(USER)


@schedule()
async def readers_stay_on_hits_during_a_rebuild(group: ServiceGroup) -> None:
    """A value held, B token, R1 reads, B snapshot, R2 reads, B fill, R1 reads: hits throughout."""
    reader, rebuilder = await group.open(), await group.open()
    await assert_true([reader], USER)
    statements = len(reader.source.statements)
    rebuilding = await group.stopped_at(rebuilder.source.before, rebuilder.rebuild(USER))
    await reader.features(USER)
    rebuilder.source.after.stop()
    rebuilder.source.before.go()
    await rebuilder.source.after.reached()
    await reader.features(USER)
    rebuilder.source.after.go()
    await rebuilding
    await reader.features(USER)
    assert len(reader.source.statements) == statements
    await assert_true([reader, rebuilder], USER)
    assert rebuilder.counted("cache_fills", outcome="stored") == len(REGISTRY)


@schedule()
async def an_event_between_token_and_snapshot(group: ServiceGroup) -> None:
    """R token, E commit, E DEL, R snapshot, R fill: refused, though the value is right."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.before, reader.features(USER))
    await writer.send(served(USER), feedback(USER))
    reader.source.before.go()
    assert await reading == await reader.recomputed(USER)
    await assert_true([reader, writer], USER)
    assert refused(reader) == len(REGISTRY)


@schedule()
async def an_event_between_token_and_snapshot_drops_late(group: ServiceGroup) -> None:
    """R token, E commit, R snapshot, R fill, E DEL: a right value is lost, harmless."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.before, reader.features(USER))
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    reader.source.before.go()
    assert await reading == await reader.recomputed(USER)
    await reader.drain()
    writer.cache.before_drop.go()
    await sending
    await assert_true([reader, writer], USER)
    assert refused(reader) == 0


@schedule()
async def an_event_just_after_the_snapshot(group: ServiceGroup) -> None:
    """R token, R snapshot, E commit, R fill lands, E DEL, E answer: the old value stood only before the answer."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    reader.source.after.go()
    await reading
    await reader.drain()
    assert refused(reader) == 0
    assert not sending.done()
    writer.cache.before_drop.go()
    await sending
    await assert_true([reader, writer], USER)


@schedule(PLAIN_SET)
async def an_event_between_snapshot_and_a_slow_fill(group: ServiceGroup) -> None:
    """R token, R snapshot, R answers, E commit, E DEL, E answer, R fill: the fill comes after R's own answer."""
    reader, writer = await group.open(), await group.open()
    reader.cache.before_fill.stop()
    await reader.features(USER)
    await reader.cache.before_fill.reached()
    await writer.send(served(USER), feedback(USER))
    reader.cache.before_fill.go()
    await assert_true([reader, writer], USER)
    assert refused(reader) == len(REGISTRY)


@schedule(CONSTANT_EPOCH, own_server=True)
async def a_value_rises_from_a_dump(group: ServiceGroup) -> None:
    """R fills, SAVE, E commit, E DEL, E answer, the server dies and comes back with the dump."""
    reader, writer = await group.open(), await group.open()
    await assert_true([reader, writer], USER)
    dump = group.save()
    held = keys(group.server)
    await writer.send(served(USER), feedback(USER))
    group.restart(dump)
    assert keys(group.server) == held, "the old values are there again"
    await reader.reconnected()
    await assert_true([reader, writer], USER)
    assert set(held) < set(keys(group.server)), "and new ones stand beside them"


@schedule(CONSTANT_EPOCH, own_server=True)
async def a_lease_rises_from_a_dump(group: ServiceGroup) -> None:
    """R token, R snapshot, SAVE, E commit, E DEL, E answer, the server comes back with R's lease, R fill."""
    reader, writer = await group.open(), await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    dump = group.save()
    await writer.send(served(USER))
    group.restart(dump)
    leases = keys(group.server)
    assert len(leases) == len(REGISTRY)
    await reader.reconnected()
    reader.source.after.go()
    await reading
    await assert_true([reader, writer], USER)
    assert all(ask(group.server, "GET", lease)[:1] == LEASE for lease in leases), "nothing was filled over them"


@schedule(own_server=True)
async def a_fill_meets_the_next_epoch(group: ServiceGroup) -> None:
    """R token, R snapshot, the server is replaced by an empty one, R fill: never sent."""
    reader = await group.open()
    reading = await group.stopped_at(reader.source.after, reader.features(USER))
    group.restart()
    await reader.reconnected()
    reader.source.after.go()
    assert await reading == await reader.recomputed(USER)
    await reader.drain()
    assert keys(group.server) == []
    assert reader.counted("cache_fills", outcome="failed") == len(REGISTRY)
    await assert_true([reader], USER)


@schedule(own_server=True)
async def a_lease_meets_the_next_epoch(group: ServiceGroup) -> None:
    """R MGET, the server is replaced, R lease: never sent under the old epoch, and R computes."""
    reader = await group.open()
    reading = await group.stopped_at(reader.cache.before_lease, reader.features(USER))
    group.restart()
    await reader.reconnected()
    reader.cache.before_lease.go()
    assert await reading == await reader.recomputed(USER)
    assert keys(group.server) == []
    await assert_true([reader], USER)


@schedule(own_server=True)
async def a_del_meets_the_next_epoch(group: ServiceGroup) -> None:
    """R fills, E commit, the server comes back with old contents, E DEL: under the new epoch, where nothing was."""
    reader, writer = await group.open(), await group.open()
    await assert_true([reader], USER)
    dump = group.save()
    sending = await group.stopped_at(writer.cache.before_drop, writer.send(served(USER)))
    group.restart(dump)
    await writer.reconnected()
    writer.cache.before_drop.go()
    await sending
    await assert_true([reader, writer], USER)


@schedule()
async def a_formula_is_rolled_forward_and_back(group: ServiceGroup) -> None:
    """The old release fills, the new one replaces, an event, the new one fills, the old one is back and reads."""
    old = await group.open()
    await assert_true([old], USER)
    new = await group.open(registry=_other_formulas())
    await assert_true([new], USER)
    await new.send(served(USER), feedback(USER))
    await assert_true([new], USER)
    back = await group.open()
    await assert_true([back], USER)
    await assert_true([old, new, back], USER)
    assert await old.features(USER) != await new.features(USER)


@schedule()
async def an_event_drops_the_other_formulas_values(group: ServiceGroup) -> None:
    """The new release fills, the old one takes an event, the new one reads."""
    old, new = await group.open(), await group.open(registry=_other_formulas())
    await assert_true([new], USER)
    await old.send(served(USER), feedback(USER))
    await assert_true([new, old], USER)


@schedule(PLAIN_SET)
async def a_replacement_meets_an_event(group: ServiceGroup) -> None:
    """The old release filled, N (new) takes that value as token, N snapshot, E commit, E DEL, N fill."""
    old, new = await group.open(), await group.open(registry=_other_formulas())
    await assert_true([old], USER)
    reading = await group.stopped_at(new.source.after, new.features(USER))
    await old.send(served(USER), feedback(USER))
    new.source.after.go()
    await reading
    await assert_true([new, old], USER)
    assert refused(new) == len(REGISTRY)


def _other_formulas() -> Registry:
    """The same names with other SQL, so that every value of the other registry is a miss."""
    return Registry(replace(entry, compute=entry.compute.replace("AS value", "+ 1 AS value")) for entry in REGISTRY)
