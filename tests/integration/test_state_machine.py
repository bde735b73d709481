"""Any sequence of what can happen, on a real Valkey and two processes over one database, against a naive model.

Invariants: a read equals a computation at its own moment, in either process, with every event that was acknowledged
before it began; every acknowledged event counts exactly once. The model is a list of acknowledged events and
`tests.support.reference`. A read may also be stopped after its snapshot while anything else happens, and let on later.
The clock steps in both directions, often to the moment at which an event enters or leaves the window.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from app.errors import CacheUnavailable, Conflict, InvalidInput
from app.events.ports import Admitted
from app.events.validation import FUTURE_TOLERANCE_MS
from app.features.clock import CLOCK_SKEW_MS, DAY_MS
from app.features.events import TipEvent, TipFeedback
from app.settings.parsers import PostgresUrl
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.clock import NOW_MS, FakeClock
from tests.support.database import column, copy_database
from tests.support.events import admitted, feedback, served
from tests.support.reference import THIRTY_DAYS_MS, profile
from tests.support.servers import StartServer, ask, keys
from tests.support.service import NEAR_AFTER, Features, PausableService, let_pass, open_gated, over
from tests.support.service_group import CONSTANT_EPOCH, PLAIN_SET, TRUE, Kind

T = TypeVar("T")
USERS = ("ann", "bob")
TIMEOUT_MS = 60
MAX_DRIFT_MS = 40 * DAY_MS

users = st.sampled_from(USERS)
processes = st.integers(0, 1)
places = st.integers(0, 1 << 16)  # of a list, whatever its length then is


class Held(NamedTuple):
    """A read stopped after its snapshot, and the time and the number of acknowledged events when it began."""

    process: int
    user_id: str
    at_ms: int
    acknowledged: int
    task: asyncio.Task[Features]


class Machine(RuleBasedStateMachine):
    """One example: a fresh database, an empty server, two processes. Subclasses say where.

    Preconditions depend only on which rules ran, never on timing, so not on `held` either: a read that was a hit in one
    run may be a miss in the next, and Hypothesis would call the test flaky. The rest is asked inside the rules.
    """

    server: EmbeddedServer
    new_database: Callable[[], Path | PostgresUrl]
    kind: Kind

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.facts: list[Admitted] = []
        self.held: Held | None = None
        self.up = True
        self.paused = False
        self.dump: Path | None = None
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._store = self.new_database()
        self._start(None)
        self.services = self.run(self._open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self) -> list[PausableService]:
        make = [
            over(self.server.url, timeout_ms=TIMEOUT_MS, kind=self.kind.cache, nonce=self.kind.nonce) for _ in range(2)
        ]
        return [await self._stack.enter_async_context(open_gated(self._store, each, self.clock)) for each in make]

    def _start(self, dump: Path | None) -> None:
        self.server.signal(signal.SIGCONT)
        self.server.kill()
        live = self.server.directory / "dump.rdb"
        live.unlink(missing_ok=True)
        if dump is not None:
            shutil.copyfile(dump, live)
        self.server.start()
        self.up, self.paused = True, False

    def teardown(self) -> None:
        try:
            self._count_events()
        finally:
            if self.paused:
                self.server.signal(signal.SIGCONT)
            for service in self.services:
                service.go()
            if self.held is not None:
                self.run(self._gathered(self.held.task))
            self.run(self._stack.aclose())
            self._runner.close()

    @staticmethod
    async def _gathered(task: asyncio.Task[Any]) -> None:
        await asyncio.gather(task, return_exceptions=True)

    def truth(self, user_id: str, acknowledged: int | None = None, at_ms: int | None = None) -> Features:
        """The model: what the acknowledged events say of a user, now or at another moment."""
        now_ms = self.clock.now_ms() if at_ms is None else at_ms
        return dict(profile(self.facts[:acknowledged], user_id, now_ms, live=True))

    def assert_true(self, found: Features, user_id: str) -> None:
        """Each value must be true now, or at most `CLOCK_SKEW_MS` later: a clock that is ahead may have computed it."""
        now_ms = self.clock.now_ms()
        edges = (fact.occurred_at_ms + THIRTY_DAYS_MS for fact in self.facts if fact.event.user_id == user_id)
        moments = [now_ms, *(edge for edge in edges if now_ms < edge <= now_ms + CLOCK_SKEW_MS)]
        allowed = [self.truth(user_id, at_ms=at_ms) for at_ms in moments]
        for name, value in found.items():
            assert value in [truth[name] for truth in allowed], (name, value, allowed)

    def stuck(self, process: int, *user_ids: str) -> bool:
        """A read of these users would wait for the one that is stopped."""
        return self.held is not None and self.held.process == process and self.held.user_id in user_ids

    # What clients do.

    @rule(process=processes, user_id=users, plain=st.booleans())
    def read(self, process: int, user_id: str, plain: bool) -> None:
        """With details; or as a recommender does, again and again, the last times from the process's own memory."""
        if self.stuck(process, user_id):
            self.let_on()
        for _ in range(NEAR_AFTER + 1 if plain else 1):
            self.assert_true(self.run(self._features(process, user_id, plain=plain)), user_id)

    async def _features(self, process: int, user_id: str, *, plain: bool) -> Features:
        service = self.services[process]
        features = await (service.plain(user_id) if plain else service.features(user_id))
        if not self.stuck(process, *USERS):
            await service.drain()
        return features

    @rule(process=processes)
    def batch(self, process: int) -> None:
        if self.stuck(process, *USERS):
            self.let_on()
        for user_id, found in self.run(self.services[process].batch(USERS)).items():
            self.assert_true(found, user_id)

    @rule(
        process=processes,
        user_id=users,
        age_ms=st.integers(0, DAY_MS) | st.integers(0, 31 * DAY_MS) | st.integers(THIRTY_DAYS_MS - 3, THIRTY_DAYS_MS),
        action=st.sampled_from([None, "completed", "dismissed", "snoozed"]),
        dwell_ms=st.none() | st.integers(0, 10_000),
        offset_min=st.sampled_from([-570, 0, 120, 345]),
        in_the_way=st.booleans(),
    )
    def event(
        self,
        process: int,
        user_id: str,
        age_ms: int,
        action: str | None,
        dwell_ms: int | None,
        offset_min: int,
        in_the_way: bool,
    ) -> None:
        """`in_the_way` of the read that is stopped, where one is."""
        if in_the_way and self.held is not None:
            user_id = self.held.user_id
        at_ms = self.clock.now_ms() - age_ms
        sent: TipEvent = (
            served(user_id, at_ms, offset_min=offset_min)
            if action is None
            else feedback(user_id, at_ms, action, dwell_ms=dwell_ms, offset_min=offset_min)
        )
        receipt = self.run(self.services[process].send(sent))
        assert (receipt.accepted, receipt.duplicates) == (1, 0)
        self.facts.append(admitted(sent))

    @precondition(lambda self: self.facts)
    @rule(process=processes, place=places)
    def duplicate(self, process: int, place: int) -> None:
        known = self.facts[place % len(self.facts)]
        if known.occurred_at_ms > self.clock.now_ms() + FUTURE_TOLERANCE_MS:  # since the clock was set back
            with pytest.raises(InvalidInput):
                self.run(self.services[process].send(known.event))
            return
        receipt = self.run(self.services[process].send(known.event))
        assert (receipt.accepted, receipt.duplicates) == (0, 1)

    @precondition(lambda self: self.facts)
    @rule(process=processes, place=places)
    def conflict(self, process: int, place: int) -> None:
        known = self.facts[place % len(self.facts)].event
        other = served(known.user_id, self.clock.now_ms(), event_id=known.event_id, tip_id="another")
        fresh = feedback(known.user_id, self.clock.now_ms())
        with pytest.raises(Conflict):
            self.run(self.services[process].send(fresh, other))

    @rule(process=processes, user_id=users, erasing=st.integers(0, 5).map(lambda draw: draw == 5))
    def rebuild(self, process: int, user_id: str, erasing: bool) -> None:
        """Or everything of the user goes."""
        if erasing:
            self.let_on()
            self.run(self.services[process].erase(user_id))
            self.facts = [fact for fact in self.facts if fact.event.user_id != user_id]
        else:
            assert self.run(self.services[process].rebuild(user_id)) == {user_id: self.truth(user_id)}

    @rule(process=processes, user_id=users, cold=st.booleans())
    def begin_a_read(self, process: int, user_id: str, cold: bool) -> None:
        """It stops after its snapshot, where it misses, until it is let on."""
        self.let_on()
        if cold and self.up and not self.paused:
            ask(self.server, "FLUSHALL")
        self.held = self.run(self._begin(process, user_id))

    async def _begin(self, process: int, user_id: str) -> Held | None:
        service = self.services[process]
        await service.drain()
        service.source.after.stop(one=True)
        task = asyncio.get_running_loop().create_task(service.features(user_id))
        arrival = asyncio.get_running_loop().create_task(service.source.after.reached())
        await asyncio.wait({task, arrival}, return_when=asyncio.FIRST_COMPLETED)
        arrival.cancel()
        if task.done():  # a hit
            service.source.after.go()
            self.assert_true(await task, user_id)
            return None
        return Held(process, user_id, self.clock.now_ms(), len(self.facts), task)

    @rule()
    def let_on(self) -> None:
        if self.held is None:
            return
        held, self.held = self.held, None
        self.services[held.process].source.go()
        found = self.run(self._result(held))
        counts = range(held.acknowledged, len(self.facts) + 1)
        allowed = [self.truth(held.user_id, count, held.at_ms) for count in counts]
        assert found in allowed, "it is older than an event that was acknowledged before it began"
        for process in (0, 1):
            self.read(process, held.user_id, plain=False)

    async def _result(self, held: Held) -> Features:
        features = await held.task
        await self.services[held.process].drain()
        return features

    # What happens to the cache. A fit of trouble is one rule, so that most steps find it well.

    @precondition(lambda self: self.up and not self.paused)
    @rule(place=places)
    def keys_expire(self, place: int) -> None:
        """One of them, or all."""
        there = keys(self.server)
        if not there or place % 4 == 0:
            ask(self.server, "FLUSHALL")
        else:
            ask(self.server, "PEXPIRE", there[place % len(there)], 0)

    @precondition(lambda self: self.up and not self.paused)
    @rule()
    def save(self) -> None:
        ask(self.server, "SAVE")
        self.dump = self.server.directory / "aside.rdb"
        shutil.copyfile(self.server.directory / "dump.rdb", self.dump)

    @precondition(lambda self: self.up and not self.paused)
    @rule(kind=st.sampled_from(["pauses", "dies", "restarts empty", "restarts with old contents"]), well=st.booleans())
    def cache_trouble(self, kind: str, well: bool) -> None:
        if kind == "pauses":
            self.server.signal(signal.SIGSTOP)
            self.paused = True
        elif kind == "dies":
            self.server.kill()
            self.up = False
        else:
            self._start(self.dump if kind.endswith("contents") else None)
            if well:
                self.all_is_well_again()

    @precondition(lambda self: self.up and not self.paused)
    @rule(process=processes, user_id=users)
    def old_contents_return_after_an_event(self, process: int, user_id: str) -> None:
        """Before time has passed, which lets most values expire."""
        self.let_on()
        self.read(process, user_id, plain=False)
        self.save()
        self.event(process, user_id, 0, "completed", None, 0, in_the_way=False)
        self._start(self.dump)
        self.all_is_well_again()
        self.read(process, user_id, plain=False)

    @precondition(lambda self: not self.up or self.paused)
    @rule(old=st.booleans(), well=st.booleans())
    def cache_returns(self, old: bool, well: bool) -> None:
        if self.paused:
            self.server.signal(signal.SIGCONT)
            self.paused = False
        else:
            self._start(self.dump if old else None)
        if well:
            self.all_is_well_again()

    @precondition(lambda self: self.up and not self.paused)
    @rule()
    def all_is_well_again(self) -> None:
        """Breakers close and debts are settled, as happens by itself within a second."""
        self.run(self._recover())

    async def _recover(self) -> None:
        for service in self.services:
            await service.reconnected()
        while await self.services[0].owed.any_owed():
            with suppress(CacheUnavailable):
                await self.services[0].invalidator.settle()
        let_pass(self.clock, 0.051)

    # What happens to time.

    @rule(ms=st.integers(-DAY_MS, DAY_MS) | st.integers(-31 * DAY_MS, 31 * DAY_MS), stepping=st.booleans())
    def time_passes(self, ms: int, stepping: bool) -> None:
        """By some milliseconds, or the wall clock is set, either way."""
        if not stepping:
            self.clock.advance(abs(ms) % 200)
        elif abs(self.clock.now_ms() + ms - NOW_MS) <= MAX_DRIFT_MS:
            self.clock.step_to(self.clock.now_ms() + ms)

    @precondition(lambda self: self.facts)
    @rule(place=places, process=processes, plain=st.booleans(), forth=st.booleans(), seldom=st.integers(0, 3))
    def window_passes_an_event(self, place: int, process: int, plain: bool, forth: bool, seldom: int) -> None:
        """Reads just before and just after an event leaves the window, in either order. Seldom, since cached values
        expire by such steps, and then no other fault shows."""
        if seldom != 0:
            return
        event = self.facts[place % len(self.facts)]
        edge_ms = event.occurred_at_ms + THIRTY_DAYS_MS
        for at_ms in (edge_ms - 1, edge_ms) if forth else (edge_ms, edge_ms - CLOCK_SKEW_MS - 1):
            self.clock.step_to(at_ms)
            self.read(process, event.event.user_id, plain)

    def _count_events(self) -> None:
        counted = self.run(column(self.services[0].database, "SELECT event_id FROM event_log ORDER BY seq"))
        assert counted == [fact.event.event_id for fact in self.facts]
        views = self.run(column(self.services[0].database, "SELECT COUNT(*) FROM tip_views"))
        reactions = self.run(column(self.services[0].database, "SELECT COUNT(*) FROM tip_feedback"))
        of_feedback = sum(isinstance(fact.event, TipFeedback) for fact in self.facts)
        assert (views, reactions) == ([len(self.facts) - of_feedback], [of_feedback])


Examples = Callable[[Kind, settings], None]


@pytest.fixture
def examples(
    request: pytest.FixtureRequest, start_server: StartServer, migrated_template: Path, tmp_path: Path
) -> Iterator[Examples]:
    """Runs the machine on an embedded Valkey of its own, and on SQLite or, by parameter, on PostgreSQL."""
    own = start_server("valkey")

    def copied() -> Path:
        for old in tmp_path.glob("profiles.db*"):
            old.unlink()
        return copy_database(migrated_template, tmp_path / "profiles.db", "the machine's")

    on_postgres = getattr(request, "param", "sqlite") == "postgres"
    emptied = request.getfixturevalue("reused_database").emptied if on_postgres else copied

    def run(which: Kind, how: settings) -> None:
        class Placed(Machine):
            server = own
            new_database = staticmethod(emptied)
            kind = which

        # No shrinking: a failure is printed as the steps that led to it, and with a real server it costs minutes.
        run_state_machine_as_test(
            Placed,
            settings=settings(
                how, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            ),
        )

    yield run
    own.signal(signal.SIGCONT)
    own.kill()


def test_every_read_is_true_when_anything_happens(examples: Examples) -> None:
    examples(TRUE, settings(max_examples=6, stateful_step_count=30, derandomize=True))


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "count"), [("sqlite", 25), ("postgres", 15)], indirect=["examples"])
def test_every_read_is_true_when_anything_happens_for_long(examples: Examples, count: int) -> None:
    examples(TRUE, settings(max_examples=count, stateful_step_count=60))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [PLAIN_SET, CONSTANT_EPOCH], ids=lambda kind: kind.name)
def test_the_machine_finds_a_stale_read_when_the_cache_is_a_mutant(examples: Examples, mutant: Kind) -> None:
    with pytest.raises((AssertionError, Flaky)):
        examples(mutant, settings(max_examples=800, stateful_step_count=40, derandomize=True))
