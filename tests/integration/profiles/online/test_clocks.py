"""Two processes over one database and one cache, whose clocks differ and step.

A served value must be true at a moment between what the clock of its process shows and `CLOCK_SKEW_MS` later, which a
clock has shown already. So if the clocks do not step, it is a moment between both.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from app.events.ports import Admitted
from app.features.clock import CLOCK_SKEW_MS, DAY_MS
from app.features.events import TipEvent
from app.profiles.online.cache_protocol import decode
from app.stores.sqlite.backup import backup, restore
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.clock import NOW_MS, FakeClock
from tests.support.events import admitted, feedback, served
from tests.support.reference import THIRTY_DAYS_MS, profile
from tests.support.service import NEAR_AFTER, Features, PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

HALF_A_SECOND, THREE_SECONDS, AN_HOUR = 500, 3_000, 3_600_000
USERS = ("ann", "bob")
STEPS = 400


class Walk:
    """Random operations on two processes. Each answer is compared with the reference."""

    def __init__(self, services: Sequence[PausableService], random: Random, apart_ms: int) -> None:
        self.services = services
        self.random = random
        self.apart_ms = apart_ms
        self.facts: list[Admitted] = []
        self.latest_ms = 0  # that a clock has shown

    async def run(self, steps: int, *, stepping: bool) -> None:
        operations = {
            self.send: 2, self.read: 12, self.rebuild: 1, self.erase: 0.5, self.to_an_edge: 6, self.step: 3 * stepping
        }  # fmt: skip
        for _ in range(steps):
            self.latest_ms = max(self.latest_ms, *(service.clock.now_ms() for service in self.services))
            (operation,) = self.random.choices(list(operations), list(operations.values()))
            await operation(self.random.choice(self.services), self.random.choice(USERS))

    async def send(self, service: PausableService, user_id: str) -> None:
        """An event that leaves the window soon or later, or is ahead of the clock."""
        random, now_ms = self.random, service.clock.now_ms()
        stays_ms = random.choice(
            [random.randrange(-50, 2_000), random.randrange(2 * AN_HOUR), random.randrange(THIRTY_DAYS_MS + 60_000)]
        )
        at_ms = now_ms - THIRTY_DAYS_MS + stays_ms
        action, dwell_ms = random.choice(["completed", "dismissed", "snoozed"]), random.randrange(10_000)
        event: TipEvent = (
            feedback(user_id, at_ms, action, dwell_ms=dwell_ms) if random.random() < 0.6 else served(user_id, at_ms)
        )
        await service.send(event)
        self.facts.append(admitted(event)._replace(occurred_at_ms=min(at_ms, now_ms)))

    async def read(self, service: PausableService, user_id: str) -> None:
        form = self.random.choice(["details", "batch", "for a decision", "values", "values"])
        for _ in range(self.random.randint(1, NEAR_AFTER + 1)):
            if form == "details":
                found = {user_id: await service.features(user_id)}
            elif form == "batch":
                found = await service.batch(USERS)
            elif form == "values":
                found = {user_id: await service.plain(user_id)}
            else:
                found = {user_id: dict(await service.reader.read_features(user_id, service.registry.full_mask))}
            self.judge(service, found)
            if self.random.random() < 0.8:
                await service.drain()

    async def rebuild(self, service: PausableService, user_id: str) -> None:
        self.judge(service, await service.rebuild(user_id))

    async def erase(self, service: PausableService, user_id: str) -> None:
        """Erase a user and send one of the events again."""
        await service.erase(user_id)
        erased = [fact for fact in self.facts if fact.event.user_id == user_id]
        self.facts = [fact for fact in self.facts if fact.event.user_id != user_id]
        if erased:
            again = self.random.choice(erased)
            await service.send(again.event)
            self.facts.append(again._replace(occurred_at_ms=min(again.occurred_at_ms, service.clock.now_ms())))

    async def to_an_edge(self, service: PausableService, user_id: str) -> None:
        """Time passes until an event has just left the window of a process, or is about to leave it."""
        now_ms = service.clock.now_ms()
        waits = [wait_ms for fact in self.facts if 0 < (wait_ms := leaves_ms(fact) - now_ms) < 5_000]
        wait_ms = min(waits, default=self.random.randrange(300)) + self.random.choice([-1, 0, 0])
        for each in self.services:
            each.clock.advance(wait_ms)

    async def step(self, service: PausableService, user_id: str) -> None:
        """A clock steps, or both do."""
        ms = self.random.choice([-1, 1]) * self.random.choice([self.apart_ms, self.apart_ms, DAY_MS])
        for each in self.random.choice([[service], self.services]):
            each.clock.step_to(each.clock.now_ms() + ms)

    def judge(self, service: PausableService, found: dict[str, Features]) -> None:
        now_ms = service.clock.now_ms()
        last_ms = min(now_ms + CLOCK_SKEW_MS, self.latest_ms)
        moments = [now_ms, *(ms for fact in self.facts if now_ms < (ms := leaves_ms(fact)) <= last_ms)]
        for user_id, features in found.items():
            true = [profile(self.facts, user_id, moment_ms, live=True) for moment_ms in moments]
            for name, value in features.items():
                assert value in [each[name] for each in true], f"{name} of {user_id} is true at none of {moments}"


def leaves_ms(fact: Admitted) -> int:
    """The first moment at which an event is not in the window any more."""
    return fact.occurred_at_ms + THIRTY_DAYS_MS


@pytest.mark.parametrize(
    ("apart_ms", "stepping"),
    [
        pytest.param(HALF_A_SECOND, False, marks=pytest.mark.slow),
        (HALF_A_SECOND, True),
        pytest.param(THREE_SECONDS, False, marks=pytest.mark.slow),
        pytest.param(THREE_SECONDS, True, marks=pytest.mark.slow),
        (AN_HOUR, False),
        pytest.param(AN_HOUR, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
async def test_every_value_is_true_at_a_moment_of_the_clocks(
    group: ServiceGroup, apart_ms: int, stepping: bool
) -> None:
    services = [await group.open(clock=FakeClock(NOW_MS + ahead_ms)) for ahead_ms in (0, apart_ms)]
    await Walk(services, Random(apart_ms), apart_ms).run(STEPS, stepping=stepping)
    for service in services:
        assert service.counted("cache_hits") > 100, "the cache took no part"
        if service.caches_locally:
            assert service.counted("cache_hits") > service.counted("near_hits") > 100, "a cache took no part"


@pytest.mark.parametrize(
    ("apart_ms", "shared"), [(HALF_A_SECOND, True), (CLOCK_SKEW_MS, True), (CLOCK_SKEW_MS + 1, False), (AN_HOUR, False)]
)
async def test_value_is_shared_when_the_clocks_differ_by_a_second_at_most(
    group: ServiceGroup, apart_ms: int, shared: bool
) -> None:
    behind, ahead = [await group.open(clock=FakeClock(NOW_MS + ahead_ms)) for ahead_ms in (0, apart_ms)]
    await behind.send(served("ann", NOW_MS + apart_ms - THIRTY_DAYS_MS))
    for _ in range(NEAR_AFTER):
        assert (await ahead.plain("ann"))["tip_volume_30d"] == 0, "the event has left the window"
        await ahead.drain()
        for read in (behind.features, behind.plain):
            assert (await read("ann"))["tip_volume_30d"] == (0 if shared else 1)
            await behind.drain()


async def versions(service: PausableService, *user_ids: str) -> set[int]:
    """The versions of the values that the cache holds."""
    await service.drain()
    return {value.version for raw in (await service.held(*user_ids)).values() if (value := decode(raw)) is not None}


async def test_no_version_repeats_when_an_erased_user_sends_again(group: ServiceGroup) -> None:
    services = [await group.open(), await group.open()]
    events: list[TipEvent] = [served("ann"), feedback("ann", dwell_ms=5)]
    seen: set[int] = set()
    for _ in range(3):
        await services[0].send(*events)
        for service in services:
            for _ in range(NEAR_AFTER):
                assert await service.plain("ann") == profile([admitted(event) for event in events], "ann", NOW_MS)
                await service.drain()
        now = await versions(services[0], "ann")
        assert now.isdisjoint(seen)
        seen |= now
        await services[1].erase("ann")
        for service in services:
            assert await service.plain("ann") == profile([], "ann", NOW_MS)
    assert len(seen) == 3


async def test_no_version_repeats_when_a_backup_is_restored(
    database_path: Path, valkey: EmbeddedServer, tmp_path: Path
) -> None:
    kept = served("ann")
    lost: list[TipEvent] = [served("ann"), feedback("ann", dwell_ms=5)]
    async with ServiceGroup(database_path, valkey) as group:
        service = await group.open()
        await service.send(kept)
        backup(database_path, tmp_path / "backup.db")
        seen: set[int] = set()
        for event in lost:
            await service.send(event)
            await service.plain("ann")
            seen |= await versions(service, "ann")
    restore(tmp_path / "backup.db", database_path)
    async with ServiceGroup(database_path, valkey) as group:
        service = await group.open()
        assert await service.plain("ann") == profile([admitted(kept)], "ann", NOW_MS)
        await service.send(lost[1])
        assert await service.plain("ann") == profile([admitted(kept), admitted(lost[1])], "ann", NOW_MS)
        restored = await versions(service, "ann")
        assert restored
        assert restored.isdisjoint(seen)
