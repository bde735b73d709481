"""The price of exact expiry: the share of values that reads compute, against values that expire by their TTL alone.

Users have a number of events a day, in the past 30 days and during the measured hours, in which each user is read once
a minute. Clock and events are simulated; cache and database are real.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import redis
import uvloop

from app.bootstrap.service import Edges, OpenService, open_service
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, Snapshot, Source
from app.settings import Settings
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.support.clock import FakeClock
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually

EVENTS_A_DAY = (0.3, 10, 300)
USERS = 20  # of each kind
MINUTES = 180
AT_ONCE = 1_000


class TtlAlone(Source):
    """A source that reports no event as leaving its window, so that values live for their whole TTL."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        snapshot = await self._inner.compute(clock_ms, asked)
        return snapshot._replace(leaves_ms=[[END_OF_TIME_MS] * len(of_row) for of_row in snapshot.leaves_ms])

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        return await self._inner.fitting(asked)

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        return await self.compute(clock_ms, asked)


def measure(environment: Environment) -> Iterator[Comparison]:
    settings = environment.settings
    copies = []
    for name in ("ttl", "exact"):
        copy = settings.require_file().with_name(f"{name}.db")
        shutil.copyfile(settings.require_file(), copy)
        copies.append(replace(settings, database=copy))
    computed: list[dict[float, float]] = []
    for own, exact in zip(copies, (False, True), strict=True):
        with redis.Redis.from_url(environment.cache_url) as cache:
            cache.flushall()
        computed.append(uvloop.run(_computed(own, environment.now_ms, exact=exact)))
    for rate in EVENTS_A_DAY:
        name = f"values computed per value read, a read a minute, {rate:g} events a day"
        yield Comparison(name, "TTL alone", computed[0][rate], computed[1][rate], None, "")


async def _computed(settings: Settings, now_ms: int, *, exact: bool) -> dict[float, float]:
    """The share of read values that were computed, by the users' events a day."""
    random, clock = Random(1), FakeClock(now_ms - DAY_MS)
    end_ms = clock.now_ms() + MINUTES * 60_000
    users = {f"rate-{rate:g}-{number}": rate for rate in EVENTS_A_DAY for number in range(USERS)}
    events = sorted((event for user, rate in users.items() for event in _events(user, rate, end_ms, random)), key=_time)
    edges = Edges(clock=clock, random=random) if exact else Edges(clock=clock, random=random, wrap_source=TtlAlone)
    values: Counter[float] = Counter()
    computed: Counter[float] = Counter()
    async with open_service(settings, door="bench", edges=edges) as service:
        sent = missed = 0
        for minute in range(MINUTES + 1):
            due = sent
            while due < len(events) and _time(events[due]) <= clock.now_ms():
                due += 1
            for start in range(sent, due, AT_ONCE):
                await service.ingestor.ingest(events[start : min(due, start + AT_ONCE)])
            sent = due
            profiles = await service.reader.read(dict.fromkeys(users, REGISTRY.full_mask))
            missed += sum(not value.cached for profile in profiles.values() for value in profile.values())
            await eventually(lambda missed=missed: _fills(service) == missed)  # type: ignore[misc]  # bound now
            for user, profile in profiles.items() if minute else ():  # the first read fills the cache
                values[users[user]] += len(profile)
                computed[users[user]] += sum(not value.cached for value in profile.values())
            clock.advance(60_000)
    return {rate: computed[rate] / values[rate] for rate in EVENTS_A_DAY}


def _fills(service: OpenService) -> float:
    outcomes = ("stored", "refused", "failed")
    return sum(
        service.metrics.collectors.get_sample_value("profiles_cache_fills_total", {"outcome": outcome}) or 0.0
        for outcome in outcomes
    )


def _events(user: str, rate: float, end_ms: int, random: Random) -> Iterator[TipEvent]:
    """Events at random times in the 31 days before `end_ms`, served tips and feedback in turn."""
    for number in range(round(rate * 31)):
        at_ms = end_ms - random.randrange(31 * DAY_MS)
        yield served(user, at_ms) if number % 2 else feedback(user, at_ms)


def _time(event: TipEvent) -> float:
    return event.occurred_at.timestamp() * 1000
