"""A run: opens the deployment, starts clients and faults, judges users as they leave, and checks the end state."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from time import monotonic, monotonic_ns

from redis.exceptions import RedisError

from app.bootstrap.service import open_service
from app.profiles.ports import END_OF_TIME_MS
from app.settings import Settings
from tests.support.fleet import counted
from tests.support.learning_check import SELECT_LEARNED, SELECT_STATES, learning_faults
from tests.support.queue import connect
from tests.support.waiting import eventually_async
from tests.torture.clients import ERASABLE, RESEND_AFTER_NS, Client, UserPool
from tests.torture.config import Config
from tests.torture.deployment import Deployment
from tests.torture.faults import Skipped
from tests.torture.plan import Step
from tests.torture.records import FaultSpan, RunRecord
from tests.torture.soak import UNREADABLE_JOB, SoakClient, watch

SAVE_EVERY_S = 0.7
POLL_S = 0.1
SETTLE_S = 60.0
KEPT_SPANS = 400
SENT_AGAIN = 500
SHOWN = ("cache_hits_total", "near_hits_total", "cache_misses_total", "degraded_reads_total", "cache_fills_total")
HALF_STORED = """
SELECT seq FROM event_log WHERE subject = 'signals.tip.served' AND seq NOT IN (SELECT seq FROM tip_views)
UNION ALL
SELECT seq FROM event_log WHERE subject = 'signals.tip.feedback' AND seq NOT IN (SELECT seq FROM tip_feedback)
UNION ALL
SELECT seq FROM (SELECT seq FROM tip_views UNION ALL SELECT seq FROM tip_feedback) AS fact
WHERE seq NOT IN (SELECT seq FROM event_log)
"""


async def torture(
    config: Config, say: Callable[[str], object] = lambda _: None, record: RunRecord | None = None
) -> RunRecord:
    """Run, and return the record. A record that is passed in is filled even if the run itself fails."""
    record = record or RunRecord()
    record.stop_at_first = config.stop_at_first
    deployment = config.deployment()
    try:
        await deployment.open()
        await _Run(config, deployment, record, say).run()
    finally:
        await deployment.close()
    return record


class _Run:
    def __init__(self, config: Config, deployment: Deployment, record: RunRecord, say: Callable[[str], object]) -> None:
        self._config = config
        self._deployment = deployment
        self._say = say
        self._record = record
        erasable = ERASABLE if config.weights.get("erase") else 0.0
        self._pool = UserPool(deployment, record, config.seed, config.users, erasable=erasable)
        self._queue = connect(deployment.queue.url)
        kind = SoakClient if config.memory_limit_mib else Client
        self._clients = [kind(number, self._pool, self._queue) for number in range(config.clients)]
        self._judge = Client(-1, self._pool, self._queue)
        self._started = monotonic()
        self._running_faults: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        config = self._config
        injecting = asyncio.create_task(self._inject())
        background = [injecting] + [
            asyncio.create_task(work()) for work in (self._watch_queue, self._judge_leaving_users, self._report)
        ]
        if any(step.fault == "restart_old" for step in config.plan()):
            background.append(asyncio.create_task(self._save_dumps()))
        memory = await watch(self._deployment) if config.memory_limit_mib else None
        if memory is not None:
            background.append(asyncio.create_task(memory.run()))
        clients = [asyncio.create_task(client.run(config.weights, config.pause_s)) for client in self._clients]
        try:
            await self._wait_for_end([*background, *clients])
            self._say(f"ended after {monotonic() - self._started:.1f} s")
            self._record.stop.set()
            injecting.cancel()
            await asyncio.gather(*clients)
            if config.stop_at_first:
                self._judge_all()  # a mutant may never settle, and the first violation is enough
            else:
                if self._running_faults:
                    await asyncio.wait(self._running_faults, timeout=SETTLE_S)
                await self._settle()
        finally:
            for task in [*background, *clients, *self._running_faults]:
                task.cancel()
            await asyncio.gather(*background, *clients, *self._running_faults, return_exceptions=True)
            for client in [*self._clients, self._judge]:
                await client.close()
            await self._queue.aclose(close_connection_pool=True)
        for defect in self._deployment.defects():
            self._record.violated(defect)
        if memory is not None:
            self._record.memory = memory.report()
            for violation in memory.violations(config.memory_limit_mib):
                self._record.violated(violation)

    async def _wait_for_end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Return when the time is over, enough was done or a violation ends the run; raise if a task failed."""
        stop = asyncio.create_task(self._record.stop.wait())
        try:
            while True:
                left_s = self._started + self._config.seconds - monotonic()
                if left_s <= 0 or stop.done() or self._enough():
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

    def _enough(self) -> bool:
        config, record = self._config, self._record
        return bool(
            (config.operations and record.operations.total() >= config.operations)
            or (config.kills and record.faults["api_killed"] >= config.kills)
        )

    # Faults.

    async def _inject(self) -> None:
        for step in self._config.plan():
            await asyncio.sleep(max(0.0, self._started + step.at_s - monotonic()))
            task = asyncio.create_task(self._run_fault(step))
            self._running_faults.add(task)
            task.add_done_callback(self._running_faults.discard)

    async def _run_fault(self, step: Step) -> None:
        start = monotonic_ns()
        try:
            async with self._config.available()[step.fault](self._deployment, Random(step.seed)):
                pass
        except (Skipped, RedisError, OSError):
            self._record.skipped[step.fault] += 1
            return
        except Exception as error:
            self._record.violated(f"the harness failed at {step}: {type(error).__name__}: {error}")
            return
        self._record.faults[step.fault] += 1
        self._record.spans.append(FaultSpan(start, monotonic_ns(), step.fault))
        del self._record.spans[:-KEPT_SPANS]

    async def _save_dumps(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            with suppress(RedisError, OSError):
                async with self._deployment.cache_lock:
                    await self._deployment.save()

    # Records.

    async def _watch_queue(self) -> None:
        """End the writes of events that workers have consumed, and send again those that seem to be lost."""
        while True:
            await asyncio.sleep(POLL_S)
            self._deployment.watch()
            users = {event_id: user for user in self._pool.all() for event_id in user.by_queue}
            if not users:
                continue
            sql = """SELECT event_id FROM event_log WHERE seq NOT IN (SELECT seq FROM outbox)
                     AND (user_id, event_id) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?))"""
            keys = json.dumps([(user.user_id, event_id) for event_id, user in users.items()])
            consumed = await asyncio.to_thread(self._deployment.rows, sql, keys)
            now = monotonic_ns()
            for (event_id,) in consumed:
                user = users.pop(event_id)
                index = user.by_queue.pop(event_id, None)
                if index is not None:
                    user.history.writes[index] = user.history.writes[index]._replace(end=now)
                    self._record.operations["consumed by queue"] += 1
                    self._record.acknowledged.add(event_id)
            for event_id, user in users.items():
                index = user.by_queue.get(event_id)
                if index is not None and now - user.history.writes[index].start > RESEND_AFTER_NS:
                    await self._judge.resend_by_http(user, event_id)

    async def _judge_leaving_users(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for user in list(self._pool.leaving):
                if not user.in_progress and not user.by_queue:
                    self._pool.leaving.remove(user)
                    self._record.judge(user)
                    await asyncio.sleep(0)

    # The end.

    async def _settle(self) -> None:
        """After the last fault: soon nothing is owed, everything is consumed, and every process answers correctly."""
        start = monotonic()
        await self._eventually(self._consumed, "everything consumed and nothing owed")
        self._say(f"settled within {monotonic() - start:.1f} s")
        users = self._pool.all()
        await self._eventually(self._queue_empty, "no event waiting on the queue")
        for user in users:
            await self._judge.send_again(user, SENT_AGAIN)
            for slot in self._deployment.apis:
                for _ in range(4):  # computed, from the cache server, and from the local cache
                    # A second attempt, since the server may have closed an idle connection.
                    if not (await self._judge.read(user, slot) or await self._judge.read(user, slot)):
                        self._record.violated(f"a read of {user.user_id} failed after the last fault")
        self._judge_all()
        for slot in (slot for slot in self._deployment.apis if slot.up):
            for name in SHOWN:
                self._record.metrics[name] += int(await counted(slot.port, name, host=slot.host))
        self._check_database()
        await self._check_profiles_of_decisions()

    def _judge_all(self) -> None:
        """Judge all users; a write whose outcome is still unknown may or may not have happened."""
        for user in self._pool.all():
            self._record.judge(user)
        self._pool.users, self._pool.leaving = [], []

    async def _eventually(self, condition: Callable[[], Awaitable[bool]], name: str) -> None:
        try:
            await eventually_async(condition, SETTLE_S, 0.05)
        except AssertionError:
            state = self._deployment.state()
            self._record.violated(f"not within {SETTLE_S:.0f} s after the last fault: {name}\n{state}")

    async def _consumed(self) -> bool:
        rows = await asyncio.to_thread(
            self._deployment.rows,
            """SELECT (SELECT COUNT(*) FROM outbox),
                      (SELECT COUNT(*) FROM owed_invalidations)""",
        )
        return rows == [(0, 0)]

    async def _queue_empty(self) -> bool:
        return not any(user.by_queue for user in self._pool.all())

    def _check_database(self) -> None:
        """Every acknowledged event is stored once and completely, and no other event; the same goes for decisions."""
        rows, violated = self._deployment.rows, self._record.violated
        stored = [event_id for (event_id,) in rows("SELECT event_id FROM event_log")]
        if lost := self._record.acknowledged - set(stored):
            violated(f"{len(lost)} acknowledged events are lost: {sorted(lost)[:5]}")
        if unknown := set(stored) - self._record.sent:
            violated(f"{len(unknown)} events are stored that no client sent: {sorted(unknown)[:5]}")
        if len(stored) != len(set(stored)):
            violated(f"{len(stored) - len(set(stored))} events are stored twice")
        if halves := rows(HALF_STORED):
            violated(f"{len(halves)} events are stored by half: {halves[:5]}")
        if damage := self._deployment.damage():
            violated(f"the database is damaged: {damage}")
        decisions = {decision_id for (decision_id,) in rows("SELECT decision_id FROM tip_scores")}
        if lost := self._record.decisions - decisions:
            violated(f"{len(lost)} decisions that were answered are lost: {sorted(lost)[:5]}")
        for fault in learning_faults(rows(SELECT_LEARNED), rows(SELECT_STATES)):
            violated(fault)
        if missing := rows("SELECT decision_id FROM tip_scores WHERE state = 'learned' AND champion_p IS NULL"):
            violated(f"{len(missing)} learned decisions have no shadow: {missing[:5]}")
        subject = UNREADABLE_JOB["subject"]
        if letters := rows("SELECT * FROM dead_letters WHERE payload NOT LIKE ? LIMIT 3", f"%{subject}%"):
            violated(f"valid events became dead letters: {letters}")

    async def _check_profiles_of_decisions(self) -> None:
        """Every profile that a decision was made from equals a computation from the events that it saw."""
        before, checked = END_OF_TIME_MS, 0
        async with open_service(Settings(database=self._deployment.store), door="command") as service:
            while page := await service.logged_profiles.newest(100, before=before):
                for check in await service.decision_checker.check(page):
                    checked += check.outcome == "consistent"
                    if check.outcome not in ("consistent", "not read"):  # not read: every feature was failing
                        self._record.violated(f"the profile of a decision: {check}")
                before = page[-1].number
        self._say(f"the profiles of {checked:,} decisions are what their events give")

    async def _report(self) -> None:
        before = 0
        while True:
            await asyncio.sleep(10)
            record = self._record
            done = record.operations.total()
            self._say(
                f"{monotonic() - self._started:6.0f} s  {done:9,d} operations ({(done - before) / 10:,.0f}/s)  "
                f"{record.faults.total():5d} faults  {record.users} users judged  "
                f"{len(record.violations)} violations  {record.undecided} undecided"
            )
            before = done
