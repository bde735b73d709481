"""Runs that several workers share: each user is rebuilt and counted once, whichever workers die."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest

import app.profiles.rebuild as module
from app.profiles.online.cache_protocol import Profile
from app.profiles.rebuild import STALE_MS, Rebuilder, RebuildRun, RebuildRunner, scope_of
from app.stores.sql.database import Connection, Database
from app.stores.sql.rebuilds import SqlRebuildRepository
from app.stores.sql.users import SqlUsers
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import log_of
from tests.support.events import admitted, served
from tests.support.registry import REGISTRY
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.both_engines
T = TypeVar("T")
USERS = [f"user-{number:02d}" for number in range(40)]
FOR_EVER = 1e9
SEEDS = 20


class Killed(Exception):
    """The worker dies here."""


class Worker(Database):
    """A worker process, and its access to the database. It rebuilds nothing, but counts the users that it would
    rebuild. It dies with a probability of `deadly` at each step, and then writes nothing more."""

    keeps = True
    dead = False
    start: asyncio.Barrier | None = None  # where it waits with its first part

    def __init__(self, database: Database, clock: FakeClock, random: Random, deadly: float = 0.0) -> None:
        self.rebuilt: Counter[str] = Counter()
        self._database = database
        self._random = random
        self._deadly = deadly
        self.computation = SimpleNamespace(registry=REGISTRY, clock=clock)
        self.repository = SqlRebuildRepository(self)
        self.runner = RebuildRunner(
            runs=self.repository,
            rebuilder=cast(Rebuilder, self),
            users=SqlUsers(self),
        )

    async def rebuild(self, user_ids: Sequence[str], _mask: int) -> dict[str, Profile]:
        if not self.rebuilt and self.start is not None:
            await self.start.wait()
        await self._step()
        self.rebuilt.update(user_ids)
        return {}

    async def read(self, work: Callable[[Connection], T], *, snapshot: bool = False) -> T:
        await self._step()
        return await self._database.read(work, snapshot=snapshot)

    async def write(self, work: Callable[[Connection], T], *, of: Collection[str] | None) -> T:
        await self._step()
        return await self._database.write(work, of=of)

    async def close(self) -> None:
        """The test closes the database."""

    async def run(self) -> None:
        with suppress(Killed):
            assert await self.runner.run("run", FOR_EVER)

    async def _step(self) -> None:
        await asyncio.sleep(0)
        self.dead = self.dead or self._random.random() < self._deadly
        if self.dead:
            raise Killed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    monkeypatch.setattr(module, "PART", 6)
    monkeypatch.setattr(module, "CHUNK", 2)
    return FakeClock()


async def store_users(database: Database) -> None:
    await log_of(database).append([[admitted(served(user)) for user in USERS]])


async def open_run(database: Database, users: list[str] | None = None) -> SqlRebuildRepository:
    for table in ("rebuilds", "rebuild_parts"):
        await database.execute(f"DELETE FROM {table}")
    run: dict[str, Any] = {"id": "run", "scope": scope_of(users), "user_ids": users, "features": [*REGISTRY.names]}
    times: dict[str, Any] = {
        "created_at_ms": NOW_MS,
        "started_at_ms": None,
        "touched_at_ms": NOW_MS,
        "finished_at_ms": None,
    }
    repository = SqlRebuildRepository(database)
    assert not await repository.open(
        RebuildRun(**run, **times, state="queued", done=0, total=1, position="", requested_by="ann", error=None)
    )
    return repository


async def faults(database: Database, clock: FakeClock, seed: int, users: list[str] | None = None) -> list[str]:
    """Let workers rebuild until the run is completed, some of which die. Return what differs from a serial pass."""
    random = Random(seed)
    repository = await open_run(database, users)
    workers = [Worker(database, clock, random, deadly=0.02) for _ in range(3)]
    await asyncio.gather(*(worker.run() for worker in workers))
    found = []
    while (run := await repository.get("run")) is not None and run.active:
        clock.advance(STALE_MS + 1)
        if len(workers) > 100:
            return ["the run is never completed"]
        workers.append(Worker(database, clock, random, deadly=0.02))
        await workers[-1].run()
    assert run is not None
    total = sum((worker.rebuilt for worker in workers), Counter[str]())
    chunks = sum(worker.dead for worker in workers)
    if total.keys() != set(USERS):
        found.append(f"not rebuilt: {set(USERS) - total.keys()}")
    if total.total() > len(USERS) + module.CHUNK * chunks:
        found.append(f"{total.total()} users rebuilt, although only {chunks} workers died in a chunk")
    if (run.state, run.done) != ("completed", len(USERS)):
        found.append(f"{run.state}, {run.done} done")
    if await database.rows("SELECT * FROM rebuild_parts"):
        found.append("parts are left")
    return found


@pytest.mark.slow
async def test_each_user_is_rebuilt_and_counted_once_whichever_workers_die(
    database: Database, clock: FakeClock
) -> None:
    await store_users(database)
    for seed in range(SEEDS):
        assert not await faults(database, clock, seed), f"seed {seed}"


async def test_listed_users_are_shared_too(database: Database, clock: FakeClock) -> None:
    for seed in range(SEEDS // 4):
        assert not await faults(database, clock, seed, USERS), f"seed {seed}"


async def test_workers_share_a_run(database: Database, clock: FakeClock) -> None:
    await store_users(database)
    repository = await open_run(database)
    workers = [Worker(database, clock, Random(1)) for _ in range(3)]
    start = asyncio.Barrier(len(workers))
    for worker in workers:
        worker.start = start
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(worker.run() for worker in workers))
    run = await repository.get("run")
    assert run is not None
    assert (run.state, run.done) == ("completed", len(USERS))
    assert sum((worker.rebuilt for worker in workers), Counter[str]()) == Counter(USERS)


async def test_worker_that_was_replaced_counts_nothing(database: Database, clock: FakeClock) -> None:
    await store_users(database)
    repository = await open_run(database)
    paused = await repository.claim("run", "", USERS[5], NOW_MS)
    assert paused is not None
    assert await repository.claim_again("run", NOW_MS + STALE_MS) is None
    taken = await repository.claim_again("run", NOW_MS + STALE_MS + 1)
    assert taken == paused._replace(claimed_at_ms=NOW_MS + STALE_MS + 1)
    assert await repository.advance(paused, 2, USERS[1], NOW_MS + STALE_MS + 2) is None
    await repository.release(paused)
    assert await repository.claim_again("run", NOW_MS + STALE_MS + 2) is None
    assert await repository.advance(taken, 6, USERS[5], NOW_MS + STALE_MS + 2) is not None
    run = await repository.get("run")
    assert run is not None
    assert (run.done, run.position) == (6, USERS[5])


async def test_position_is_claimed_once(database: Database) -> None:
    repository = await open_run(database)
    assert await repository.claim("run", "", "b", NOW_MS) is not None
    assert await repository.claim("run", "", "b", NOW_MS) is None
    assert await repository.claim("run", "b", "c", NOW_MS) is not None


async def test_run_is_not_completed_while_a_part_is_claimed(database: Database, clock: FakeClock) -> None:
    await store_users(database)
    repository = await open_run(database)
    part = await repository.claim("run", "", USERS[-1], NOW_MS)
    assert part is not None
    other = Worker(database, clock, Random(1))
    await other.run()
    run = await repository.get("run")
    assert run is not None
    assert run.state == "running"
    assert not other.rebuilt
    assert await repository.advance(part, len(USERS), part.last, NOW_MS) is not None
    await other.run()
    run = await repository.get("run")
    assert run is not None
    assert (run.state, run.done) == ("completed", len(USERS))


async def test_cancelled_run_loses_its_parts(database: Database) -> None:
    repository = await open_run(database)
    part = await repository.claim("run", "", "b", NOW_MS)
    assert part is not None
    assert await repository.finish("run", "cancelled", NOW_MS, None)
    assert await repository.advance(part, 1, "a", NOW_MS) is None
    assert await repository.claim_again("run", NOW_MS + 2 * STALE_MS) is None
    assert await database.rows("SELECT * FROM rebuild_parts") == []


async def test_worker_leaves_out_what_another_has_claimed(database: Database, clock: FakeClock) -> None:
    await store_users(database)
    repository = await open_run(database)
    worker = Worker(database, clock, Random(1))
    assert await repository.claim("run", "", USERS[1], NOW_MS) is not None
    await worker.run()
    assert worker.rebuilt == Counter(USERS[2:])
