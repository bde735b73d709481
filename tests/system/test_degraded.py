"""Cache or queue in trouble, seen by two API processes: reads stay right and quick, events are accepted and durable.

Each test drives clients through three phases: as long as all is well, during the trouble, and while it goes. In every
one no read is older than an acknowledged event, whichever process took it. At the end hits come back.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from statistics import quantiles
from typing import Any

import pytest

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.fleet import Fleet, Member, counted
from tests.support.http import Connection
from tests.support.proxy import proxy
from tests.support.servers import ask
from tests.support.traffic import Client, TrafficRecord
from tests.support.waiting import eventually, eventually_async

pytestmark = pytest.mark.slow

CLIENTS = 4
PAIRS_BEFORE = 15
PAIRS_DURING = 15
PAIRS_AFTER = 15
TIMEOUT_MS = 100  # after which reads go on without the cache
QUICK_S = 2.5
SHARED_USERS = [f"shared-{number}" for number in range(6)]
Step = Callable[[], object]


class Trouble:
    def __init__(self, fleet: Fleet, apis: list[Member]) -> None:
        self.fleet = fleet
        self.apis = apis
        self.books = TrafficRecord()
        ports = [api.port for api in apis]
        self._clients = [Client(f"client-{number}", ports, self.books, SHARED_USERS) for number in range(CLIENTS)]
        self._probes = [Connection(port) for port in ports]

    async def pairs(self, count: int) -> None:
        """So many event-then-read pairs for each client, then every shared user through some process."""

        async def run(client: Client) -> None:
            for _ in range(count):
                await client.pair()
            for user in SHARED_USERS:
                await client.look_at(user)

        await asyncio.gather(*(run(client) for client in self._clients))

    async def quick_pairs(self, quick_s: float) -> None:
        """The same. Nine of ten answers take less than `quick_s`; the others, the machine may have held up."""
        self.books.seconds.clear()
        await self.pairs(PAIRS_DURING)
        assert quantiles(self.books.seconds, n=10)[-1] < quick_s, self.books.seconds

    async def readiness(self) -> list[dict[str, Any]]:
        answers = [await probe.get("/readyz") for probe in self._probes]
        assert {answer.status for answer in answers} == {200}
        return [answer.json for answer in answers]

    async def all_ready(self) -> None:
        """Wait until every process is ready, a worker aside."""

        async def asked() -> bool:
            said = [one["checks"] for one in await self.readiness()]
            return all(value == "ok" for checks in said for name, value in checks.items() if name != "worker")

        await eventually_async(asked, step_s=0.1)

    async def hits_return(self) -> None:
        """Reads are answered from the cache again, in each process."""
        for api, probe in zip(self.apis, self._probes, strict=True):
            before = await counted(api.port, "cache_hits_total")

            async def hit(probe: Connection = probe, api: Member = api, before: float = before) -> bool:
                await probe.get(f"/profiles/{SHARED_USERS[0]}")
                return await counted(api.port, "cache_hits_total") > before

            await eventually_async(hit)

    def check(self) -> None:
        assert self.books.stale == []
        assert self.books.wrong == []
        assert self.books.statuses.keys() == {200, 202}
        assert self.fleet.stored() == dict.fromkeys(self.books.event_ids, 1)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        for probe in self._probes:
            await probe.close()


@asynccontextmanager
async def trouble(fleet: Fleet, apis: list[Member] | None = None) -> AsyncIterator[Trouble]:
    opened = Trouble(fleet, apis or await fleet.apis(2, cache_timeout_ms=TIMEOUT_MS))
    try:
        await opened.pairs(PAIRS_BEFORE)
        yield opened
    finally:
        await opened.close()


async def goes_through(now: Trouble, begin: Step, end: Step, *, says: str = "cache", quick_s: float = QUICK_S) -> None:
    """The three phases. During the trouble some process names `says`, and answers are quick."""
    await _take(begin)
    await now.quick_pairs(quick_s)
    said = [one["checks"][says] for one in await now.readiness() if one["status"] == "degraded"]
    assert any("it " in one for one in said), await now.readiness()
    now.check()

    returning = asyncio.get_running_loop().create_task(now.pairs(PAIRS_AFTER))
    await _take(end)
    await returning
    now.check()
    await now.all_ready()
    await now.pairs(3)
    await now.hits_return()
    now.check()


async def _take(step: Step) -> None:
    outcome = step()
    if isinstance(outcome, Awaitable):
        await outcome


async def test_reads_stay_right_when_the_cache_is_paused(fleet: Fleet) -> None:
    async with trouble(fleet) as now:
        await goes_through(now, lambda: fleet.cache.signal(signal.SIGSTOP), lambda: fleet.cache.signal(signal.SIGCONT))


async def test_reads_stay_right_when_the_cache_is_killed_and_starts_empty(fleet: Fleet) -> None:
    async with trouble(fleet) as now:
        await goes_through(now, fleet.cache.kill, lambda: asyncio.to_thread(fleet.cache.start))


async def test_reads_stay_right_when_the_cache_restores_old_contents(fleet: Fleet) -> None:
    async with trouble(fleet) as now:
        dump = fleet.cache.directory / "dump.rdb"
        ask(fleet.cache, "SAVE")
        shutil.copyfile(dump, aside := dump.with_suffix(".aside"))
        assert ask(fleet.cache, "DBSIZE") > 0
        await now.pairs(5)

        def return_as_it_was() -> Awaitable[None]:
            shutil.copyfile(aside, dump)
            return asyncio.to_thread(fleet.cache.start)

        await goes_through(now, fleet.cache.kill, return_as_it_was)


async def test_reads_stay_right_when_the_cache_becomes_a_replica(fleet: Fleet) -> None:
    async with trouble(fleet) as now:
        await goes_through(
            now,
            # Its master does not exist: what it holds stays, and GET goes on answering.
            lambda: ask(fleet.cache, "REPLICAOF", "127.0.0.1", 1),
            lambda: ask(fleet.cache, "REPLICAOF", "NO", "ONE"),
        )


async def test_reads_stay_right_when_the_cache_is_full(fleet: Fleet) -> None:
    async with trouble(fleet) as now:
        ask(fleet.cache, "CONFIG", "SET", "maxmemory-policy", "noeviction")
        await goes_through(
            now,
            lambda: ask(fleet.cache, "CONFIG", "SET", "maxmemory", 1),
            lambda: ask(fleet.cache, "CONFIG", "SET", "maxmemory", 0),
        )


@pytest.mark.parametrize("kind", ["cut", "silence"])
async def test_reads_stay_right_when_one_process_cannot_reach_the_cache(fleet: Fleet, kind: str) -> None:
    async with proxy(fleet.cache.socket_path) as way:
        apis = [
            *(await fleet.apis(1, cache_timeout_ms=TIMEOUT_MS)),
            *(await fleet.apis(1, cache_url=way.url, cache_timeout_ms=TIMEOUT_MS)),
        ]
        async with trouble(fleet, apis) as now:
            await goes_through(now, way.cut if kind == "cut" else way.silence, way.mend)


async def test_ingest_is_as_fast_when_the_queue_is_paused(fleet: Fleet) -> None:
    worker = fleet.worker()
    async with trouble(fleet) as now:
        await goes_through(
            now,
            lambda: fleet.queue.signal(signal.SIGSTOP),
            lambda: fleet.queue.signal(signal.SIGCONT),
            says="queue",
            quick_s=2 * QUICK_S,
        )
    await eventually(lambda: fleet.unconsumed() == 0)
    assert worker.program.running


async def test_events_are_consumed_when_the_queue_is_killed(fleet: Fleet) -> None:
    worker = fleet.worker()
    async with trouble(fleet) as now:
        fleet.queue.kill()
        await now.quick_pairs(QUICK_S)
        assert all(one["checks"]["queue"] != "ok" for one in await now.readiness())
        await eventually(lambda: fleet.unconsumed() == 0)  # the sweep needs no queue
        fleet.queue.start()
        await now.all_ready()
        await now.pairs(PAIRS_AFTER)
        now.check()
    assert worker.program.running
    await _health_key(fleet.queue)
    await eventually(lambda: fleet.unconsumed() == 0)


async def _health_key(queue: EmbeddedServer) -> None:
    await eventually(lambda: ask(queue, "EXISTS", "arq:queue:health-check") == 1)
