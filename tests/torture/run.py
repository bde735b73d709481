"""A run: opens the site, lets clients and faults loose on it, judges users as they leave, and says what was found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic, monotonic_ns

from redis.exceptions import RedisError

from app.stores.queue.client import connect
from tests.support.fleet import counted
from tests.support.learned import SELECT_LEARNED, SELECT_STATES, learning_faults
from tests.support.waiting import eventually_async
from tests.torture.books import Book, Ledger, Span
from tests.torture.clients import LATE_NS, Client, Crowd
from tests.torture.faults import FAULTS, Missed
from tests.torture.plan import Step, draw_plan
from tests.torture.site import Site

SAVE_EVERY_S = 0.7
LOOK_EVERY_S = 0.1
SETTLE_S = 60.0
SHOWN = ("cache_hits_total", "near_hits_total", "cache_misses_total", "degraded_reads_total", "cache_fills_total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a run is made of. The seed draws everything else."""

    seed: int
    seconds: float
    clients: int = 10
    users: int = 40
    apis: int = 2
    rate_per_s: float = 1.0
    hesitate: str = "0.02:0.02"
    faults: Sequence[str] = field(default_factory=lambda: tuple(FAULTS))
    mutant: str | None = None
    stop_at_first: bool = False
    disk: Path | None = None
    operations: int = 0

    def plan(self) -> list[Step]:
        """The faults of this run."""
        return draw_plan(self.seed, self.seconds, self.faults, self.rate_per_s) if self.faults else []


async def torture(
    config: Config, say: Callable[[str], object] = lambda _: None, ledger: Ledger | None = None
) -> Ledger:
    """Run; whatever was found is in the ledger, in the one given also where the run itself fails."""
    ledger = ledger or Ledger()
    ledger.stop_at_first = config.stop_at_first
    site = Site(apis=config.apis, mutant=config.mutant, hesitate=config.hesitate, disk=config.disk)
    try:
        await site.open()
        return await _Run(config, site, ledger, say).run()
    finally:
        await site.close()


class _Run:
    def __init__(self, config: Config, site: Site, ledger: Ledger, say: Callable[[str], object]) -> None:
        self._config = config
        self._site = site
        self._say = say
        self._ledger = ledger
        self._crowd = Crowd(site, self._ledger, config.seed, config.users)
        self._queue = connect(site.queue.url)
        self._clients = [Client(number, self._crowd, self._queue) for number in range(config.clients)]
        self._judge = Client(-1, self._crowd, self._queue)
        self._started = monotonic()
        self._befalling: set[asyncio.Task[None]] = set()

    async def run(self) -> Ledger:
        beside = [
            asyncio.create_task(work())
            for work in (self._inject, self._save, self._watch_the_queue, self._judge_the_leaving, self._report)
        ]
        clients = [asyncio.create_task(client.run()) for client in self._clients]
        try:
            await self._end_comes([*beside, *clients])
            self._ledger.stop.set()
            await asyncio.gather(*clients)
            if self._befalling:
                await asyncio.wait(self._befalling, timeout=SETTLE_S)
            beside[0].cancel()
            if self._config.stop_at_first:
                self._judge_all()  # who looks for one violation need not wait until all is well, which may never come
            else:
                await self._settle()
        finally:
            for task in [*beside, *clients, *self._befalling]:
                task.cancel()
            await asyncio.gather(*beside, *clients, *self._befalling, return_exceptions=True)
            for client in [*self._clients, self._judge]:
                await client.close()
            await self._queue.aclose(close_connection_pool=True)
        for defect in self._site.defects():
            self._ledger.violated(defect)
        return self._ledger

    async def _end_comes(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """The time is over, enough was done, or a violation ends it; raises what a task raised."""
        stop = asyncio.create_task(self._ledger.stop.wait())
        try:
            while True:
                left_s = self._started + self._config.seconds - monotonic()
                enough = self._config.operations and self._ledger.operations.total() >= self._config.operations
                if left_s <= 0 or enough or stop.done():
                    return
                done, _ = await asyncio.wait(
                    {stop, *tasks}, timeout=min(left_s, 1.0), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done - {stop}:
                    if (error := task.exception()) is not None:
                        raise error
                tasks = [task for task in tasks if not task.done()]
        finally:
            stop.cancel()

    # Faults.

    async def _inject(self) -> None:
        for step in self._config.plan():
            await asyncio.sleep(max(0.0, self._started + step.at_s - monotonic()))
            task = asyncio.create_task(self._befall(step))
            self._befalling.add(task)
            task.add_done_callback(self._befalling.discard)

    async def _befall(self, step: Step) -> None:
        start = monotonic_ns()
        try:
            async with FAULTS[step.fault](self._site, Random(step.seed)):
                pass
        except (Missed, RedisError, OSError):
            self._ledger.missed[step.fault] += 1
            return
        except Exception as error:
            self._ledger.violated(f"the harness failed at {step}: {error!r}")
            return
        self._ledger.faults[step.fault] += 1
        self._ledger.spans.append(Span(start, monotonic_ns(), step.fault))
        del self._ledger.spans[:-400]

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            with suppress(RedisError, OSError):
                async with self._site.cache_turn:
                    await self._site.save()

    # Books.

    async def _watch_the_queue(self) -> None:
        """What workers have consumed is effective; what they seem to have lost is sent again."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._site.watch()
            books = {event_id: book for book in self._all_books() for event_id in book.by_queue}
            if not books:
                continue
            sql = """SELECT event_id FROM event_log
                     WHERE consumed_at_ms IS NOT NULL AND event_id IN (SELECT value FROM json_each(?))"""
            consumed = await asyncio.to_thread(self._site.rows, sql, json.dumps(list(books)))
            now = monotonic_ns()
            for (event_id,) in consumed:
                book = books.pop(event_id)
                place = book.by_queue.pop(event_id, None)
                if place is not None:
                    book.history.writes[place] = book.history.writes[place]._replace(end=now)
                    self._ledger.operations["consumed by queue"] += 1
                    self._ledger.acknowledged.add(event_id)
            for event_id, book in books.items():
                place = book.by_queue.get(event_id)
                if place is not None and now - book.history.writes[place].start > LATE_NS:
                    await self._judge.send_late(book, event_id)

    def _all_books(self) -> list[Book]:
        return [*self._crowd.books, *self._crowd.leaving]

    async def _judge_the_leaving(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for book in list(self._crowd.leaving):
                if not book.under_way and not book.by_queue:
                    self._crowd.leaving.remove(book)
                    self._ledger.judge(book)
                    await asyncio.sleep(0)

    # The end.

    async def _settle(self) -> None:
        """All faults are over: soon nothing is owed, everything is consumed, and every process tells the truth."""
        start = asyncio.get_running_loop().time()
        await self._eventually(self._consumed, "everything consumed and nothing owed")
        self._say(f"settled within {asyncio.get_running_loop().time() - start:.1f} s")
        books = self._all_books()
        await self._eventually(self._no_queue, "no event waiting on the queue")
        for book in books:
            for slot in self._site.apis:
                for _ in range(4):  # computed, from the cache, and from the process's own memory
                    # Twice: a connection that nobody used for a while may have been closed.
                    if not (await self._judge.read(book, slot) or await self._judge.read(book, slot)):
                        self._ledger.violated(f"a read of {book.user_id} failed though all is well")
        self._judge_all()
        for slot in self._site.apis:
            for name in SHOWN:
                self._ledger.metrics[name] += int(await counted(slot.port, name))
        self._count_events()

    def _judge_all(self) -> None:
        """Nobody asks anything any more: what is not known to have been done may have been, or not."""
        for book in self._all_books():
            self._ledger.judge(book)
        self._crowd.books, self._crowd.leaving = [], []

    async def _eventually(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        try:
            await eventually_async(condition, SETTLE_S, 0.05)
        except AssertionError:
            self._ledger.violated(f"not within {SETTLE_S:.0f} s after the last fault: {what}\n{self._site.state()}")

    async def _consumed(self) -> bool:
        rows = await asyncio.to_thread(
            self._site.rows,
            """SELECT (SELECT COUNT(*) FROM event_log WHERE consumed_at_ms IS NULL),
                      (SELECT COUNT(*) FROM owed_invalidations)""",
        )
        return rows == [(0, 0)]

    async def _no_queue(self) -> bool:
        return not any(book.by_queue for book in self._all_books())

    def _count_events(self) -> None:
        """Durability: each acknowledged event is there once, and nothing is there that nobody sent.

        So is each decision that was answered, and each was learned once.
        """
        stored = [event_id for (event_id,) in self._site.rows("SELECT event_id FROM event_log")]
        held = set(stored)
        facts = self._site.rows("SELECT (SELECT COUNT(*) FROM tip_views) + (SELECT COUNT(*) FROM tip_feedback)")[0][0]
        if lost := self._ledger.acknowledged - held:
            self._ledger.violated(f"{len(lost)} acknowledged events are gone: {sorted(lost)[:5]}")
        if strange := held - self._ledger.sent:
            self._ledger.violated(f"{len(strange)} events are stored that nobody sent: {sorted(strange)[:5]}")
        if len(stored) != len(held) or facts != len(held):
            self._ledger.violated(f"{len(held)} events have {len(stored)} log rows and {facts} facts")
        decisions = {name for (name,) in self._site.rows("SELECT decision_id FROM tip_scores")}
        if lost := self._ledger.decisions - decisions:
            self._ledger.violated(f"{len(lost)} decisions that were answered are gone: {sorted(lost)[:5]}")
        for fault in learning_faults(self._site.rows(SELECT_LEARNED), self._site.rows(SELECT_STATES)):
            self._ledger.violated(fault)
        letters = self._site.rows("SELECT * FROM dead_letters LIMIT 3")
        if letters:
            self._ledger.violated(f"good events were buried: {letters}")

    async def _report(self) -> None:
        before = 0
        while True:
            await asyncio.sleep(10)
            done = self._ledger.operations.total()
            self._say(
                f"{monotonic() - self._started:6.0f} s  {done:9,d} operations ({(done - before) / 10:,.0f}/s)  "
                f"{self._ledger.faults.total():5d} faults  {self._ledger.users} users judged  "
                f"{len(self._ledger.violations)} violations  {self._ledger.undecided} undecided"
            )
            before = done
