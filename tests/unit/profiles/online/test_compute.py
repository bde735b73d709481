"""Computations are shared by waiting requests, sliced, and never give a value of another dtype."""

import asyncio
import json
from collections.abc import Callable, Sequence
from random import Random

import msgspec
import pytest

from app.errors import StoreUnavailable
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.features.ids import user_hash
from app.features.registry import Registry
from app.profiles.online.cache_protocol import Profile
from app.profiles.online.compute import CAP, MOMENTS_ALWAYS, Computation
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, Snapshot
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource
from app.telemetry import Metrics, configure_logging
from tests.support.clock import NOW_MS, FakeClock
from tests.support.entries import entry
from tests.support.events import admitted, feedback, served
from tests.support.logs import logging_put_back
from tests.support.registry import REGISTRY
from tests.support.waiting import PATIENCE_S, eventually

PAIR = Registry([entry(name="one"), entry(name="two", default=7)])


class ScriptedSource:
    """A source whose statements wait until a test lets them go on, and yield what it says."""

    def __init__(self, value: Callable[[ComputeRow, int], object] = lambda asked, index: index) -> None:
        self.begun: list[list[ComputeRow]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.errors: dict[tuple[int, int], str] = {}
        self.overdue = 0
        self.fit = CAP
        self.failure: Exception | None = None
        self._value = value

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        self.begun.append(list(asked))
        seq = len(self.begun)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        rows: list[Sequence[object]] = [[self._value(row, index) for index in range(2)] for row in asked]
        return Snapshot(rows, [seq] * len(rows), [[END_OF_TIME_MS] * 2] * len(rows), self.errors, self.overdue)

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        return min(self.fit, len(asked))

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """The same; the source does not tell them apart."""
        return await self.compute(clock_ms, asked)


def computation(source: ScriptedSource, metrics: Metrics | None = None, width: int = 1) -> Computation:
    return Computation(source, PAIR, FakeClock(), metrics or Metrics(), width, Random(1))


def outcomes(found: Profile) -> dict[int, tuple[bytes, str | None]]:
    return {index: (value.json, value.error) for index, value in found.items()}


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.collectors.get_sample_value(f"profiles_{name}_total", labels) or 0.0


async def test_requests_of_one_tick_share_a_statement(metrics: Metrics) -> None:
    source = ScriptedSource()
    live = computation(source, metrics, width=4)
    answers = await asyncio.gather(live.live({"ann": 1}), live.live({"bob": 2}), live.live({"ann": 2, "cid": 3}))
    assert source.begun == [[ComputeRow("ann", 3), ComputeRow("bob", 2), ComputeRow("cid", 3)]]
    assert [{user: one[0 if 0 in one else 1].version for user, one in answer.items()} for answer in answers] == [
        {"ann": 1},
        {"bob": 1},
        {"ann": 1, "cid": 1},
    ]
    assert counted(metrics, "computed_users") == 3


async def test_request_does_not_join_a_running_statement() -> None:
    source = ScriptedSource()
    source.open.clear()
    live = computation(source, width=2)
    first = asyncio.create_task(live.live({"ann": 1}))
    await eventually(lambda: len(source.begun) == 1)
    second = asyncio.create_task(live.live({"ann": 1}))
    await eventually(lambda: len(source.begun) == 2)
    source.open.set()
    assert ((await first)["ann"][0].version, (await second)["ann"][0].version) == (1, 2)


async def test_requests_wait_together_when_every_reader_is_busy() -> None:
    source = ScriptedSource()
    source.open.clear()
    live = computation(source, width=1)
    first = asyncio.create_task(live.live({"ann": 1}))
    await eventually(lambda: len(source.begun) == 1)
    waiting = [asyncio.create_task(live.live({f"user-{number}": 1})) for number in range(10)]
    source.open.set()
    answers = await asyncio.gather(first, *waiting)
    assert [len(asked) for asked in source.begun] == [1, 10]
    assert [one[0].version for answer in answers for one in answer.values()] == [1] + [2] * 10


async def test_single_read_goes_between_when_a_batch_needs_several_statements() -> None:
    source = ScriptedSource()
    live = computation(source, width=1)
    batch = {f"user-{number}": 1 for number in range(2 * CAP + 1)}
    found, single = await asyncio.gather(live.live(batch), live.live({"ann": 1}))
    assert [len(asked) for asked in source.begun] == [CAP, 1, CAP, 1]
    assert source.begun[1] == [ComputeRow("ann", 1)]
    assert outcomes(single["ann"]) == {0: (b"0", None)}
    assert list(found) == list(batch)


async def test_user_is_complete_when_another_request_wants_less() -> None:
    source = ScriptedSource()
    live = computation(source, width=1)
    batch = {f"user-{number}": 3 for number in range(CAP + 1)}
    whole, narrow = await asyncio.gather(live.live(batch), live.live({"user-0": 1}))
    assert [len(asked) for asked in source.begun] == [CAP, 2]
    assert [len(one) for one in whole.values()] == [2] * (CAP + 1)
    assert {user: outcomes(one) for user, one in narrow.items()} == {"user-0": {0: (b"0", None)}}


async def test_nothing_is_computed_when_nothing_is_asked() -> None:
    source = ScriptedSource()
    assert await computation(source).live({}) == {}
    assert await computation(source).moments([]) == []
    assert source.begun == []


async def test_past_reads_take_turns_in_slices() -> None:
    source = ScriptedSource()
    past = computation(source, width=2)
    source.fit = 1
    source.open.clear()
    heavy = [ComputeRow("heavy", 1, number) for number in range(1, 6)]
    asking = [asyncio.create_task(past.moments(rows)) for rows in (heavy, [ComputeRow("light", 1, 1)])]
    await eventually(lambda: source.begun)
    source.open.set()
    answers = await asyncio.gather(*asking)
    assert [len(answer) for answer in answers] == [5, 1]
    assert [[row.user_id for row in asked] for asked in source.begun] == [["heavy"], ["light"], *[["heavy"]] * 4]


async def test_only_a_small_request_joins_a_large_one() -> None:
    source = ScriptedSource()
    clock = FakeClock()
    past = Computation(source, PAIR, clock, Metrics(), 2, Random(1))
    source.open.clear()
    rows = [ComputeRow("heavy", 1, 1)] * (MOMENTS_ALWAYS + 2) * CAP
    first = asyncio.create_task(past.moments(rows[:1]))
    await eventually(lambda: source.begun)
    clock.advance(1000)  # what a slice takes
    source.open.set()
    await first
    source.open.clear()
    large = asyncio.create_task(past.moments(rows))
    await eventually(lambda: len(source.begun) == 2)
    assert (past.history_overloaded(1), past.history_overloaded(10 * CAP)) == (False, False)
    assert past.history_overloaded(len(rows))
    source.open.set()
    await large
    assert not past.history_overloaded(len(rows))


async def test_past_reads_are_refused_when_the_process_stops() -> None:
    source = ScriptedSource()
    past = computation(source, width=2)
    source.fit = 1
    source.open.clear()
    running, waiting = (asyncio.create_task(past.moments([ComputeRow("ann", 1, 1)] * 3)) for _ in range(2))
    await eventually(lambda: source.begun)
    past.stopping = True
    source.open.set()
    for refused in (running, waiting, past.moments([ComputeRow("bob", 1, 1)])):
        with pytest.raises(StoreUnavailable, match="this process stops"):
            await refused
    assert len(source.begun) == 1
    assert outcomes((await past.live({"ann": 1}))["ann"]) == {0: (b"0", None)}


async def test_others_are_answered_when_one_request_is_cancelled() -> None:
    source = ScriptedSource()
    source.open.clear()
    live = computation(source)
    gone, stays = asyncio.create_task(live.live({"ann": 1})), asyncio.create_task(live.live({"bob": 1}))
    await eventually(lambda: source.begun)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    source.open.set()
    assert outcomes((await stays)["bob"]) == {0: (b"0", None)}


async def test_all_sharing_requests_fail_when_a_statement_fails() -> None:
    source = ScriptedSource()
    source.failure = StoreUnavailable("locked")
    live = computation(source)
    failed = await asyncio.gather(live.live({"ann": 1}), live.live({"bob": 1}), return_exceptions=True)
    assert [str(error) for error in failed] == ["locked", "locked"]
    source.failure = None
    assert outcomes((await live.live({"ann": 1}))["ann"]) == {0: (b"0", None)}


async def test_default_stands_when_the_sql_gives_nothing() -> None:
    source = ScriptedSource(lambda asked, index: None)
    computed = await computation(source).live({"ann": 3})
    assert outcomes(computed["ann"]) == {0: (b"null", None), 1: (b"7", None)}


@pytest.mark.parametrize("raw", [1.5, "1", b"", b"blob", float("inf"), True])
async def test_value_of_another_dtype_is_refused_and_counted(metrics: Metrics, raw: object) -> None:
    source = ScriptedSource(lambda asked, index: raw if (asked.user_id, index) == ("bob", 0) else 5)
    computed = await computation(source, metrics).live({"ann": 3, "bob": 3})
    refused = computed["bob"][0]
    assert refused.json == b"null"
    assert "int is declared" in (refused.error or "")
    sound = [computed["ann"][0], computed["ann"][1], computed["bob"][1]]
    assert [(value.json, value.error) for value in sound] == [(b"5", None)] * 3
    assert counted(metrics, "computation_errors", feature="one") == 1
    assert counted(metrics, "computation_errors", feature="two") == 0


async def test_log_names_a_user_only_by_hash_when_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_put_back():
        configure_logging("json", "info")
        await computation(ScriptedSource(lambda asked, index: "text")).live({"ann": 1})
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["event"], line["feature"], line["user"]) == ("computation_failed", "one", user_hash("ann"))
    assert "ann" not in {str(value) for value in line.values()}


async def test_failed_cell_is_refused_and_counted(metrics: Metrics) -> None:
    source = ScriptedSource()
    source.errors[1, 1] = "the SQL failed: integer overflow"
    answers = await computation(source, metrics).moments([ComputeRow("ann", 3, 1), ComputeRow("bob", 3, 1)])
    assert outcomes(answers[0]) == {0: (b"0", None), 1: (b"1", None)}
    assert outcomes(answers[1]) == {0: (b"0", None), 1: (b"null", "the SQL failed: integer overflow")}
    assert counted(metrics, "computation_errors", feature="two") == 1


FAULTS = {
    "float_for_int": ("int", "SELECT user_id, AVG(dwell_ms) / 4 AS value FROM feedback GROUP BY user_id", "float 12.5"),
    "infinite": ("float", "SELECT user_id, 9e999 * COUNT(*) AS value FROM feedback GROUP BY user_id", "float inf"),
    "text_for_int": ("int", "SELECT user_id, MAX(action) AS value FROM feedback GROUP BY user_id", "text"),
    "blob_for_str": ("str", "SELECT user_id, CAST(MAX(tip_id) AS BLOB) AS value FROM feedback", "blob"),
    "two_rows": ("int", "SELECT user_id, local_hour AS value FROM feedback", "more than one row"),
    "overflow": ("int", "SELECT user_id, SUM(9223372036854775807) AS value FROM feedback", "overflow"),
    "no_utf8": ("str", "SELECT user_id, CAST(x'ff' AS TEXT) AS value FROM feedback LIMIT 1", "UTF-8 column 'no_utf8'"),
}


async def test_only_faulty_cells_are_null_with_real_sql(
    database: SqliteDatabase, event_log: SqliteEventLog, metrics: Metrics
) -> None:
    registry = Registry(
        [*REGISTRY, *(entry(name=name, dtype=dtype, compute=sql) for name, (dtype, sql, _) in FAULTS.items())]
    )
    events: list[TipEvent] = [feedback("ann", dwell_ms=0), feedback("ann", dwell_ms=100), served("ann"), served("bob")]
    await event_log.append([[admitted(event) for event in events]])
    live = Computation(SqliteSource(database, registry), registry, FakeClock(), metrics, 2, Random(1))
    computed = await live.live({"ann": registry.full_mask, "bob": registry.full_mask})

    assert profile(registry, computed["ann"]) == {
        "completion_rate_30d": 1.0,
        "dismiss_rate_30d": 0.0,
        "mean_dwell_ms_30d": 50.0,
        "preferred_hour": 12,
        "tip_volume_30d": 1,
        **dict.fromkeys(FAULTS),
    }
    assert profile(registry, computed["bob"])["tip_volume_30d"] == 1
    assert not [outcome for outcome in computed["bob"].values() if outcome.error]
    for name, (_, _, reason) in FAULTS.items():
        index = registry.names.index(name)
        assert reason in (computed["ann"][index].error or ""), name
        assert counted(metrics, "computation_errors", feature=name) == 1


def profile(registry: Registry, values: Profile) -> dict[str, object]:
    return {registry[index].name: msgspec.json.decode(value.json) for index, value in values.items()}


async def test_event_ahead_of_the_clock_counts(database: SqliteDatabase, event_log: SqliteEventLog) -> None:
    ahead_ms = NOW_MS + 40 * DAY_MS
    await event_log.append([[admitted(served("ann")), admitted(served("bob")), admitted(served("bob", ahead_ms))]])
    live = Computation(SqliteSource(database, REGISTRY), REGISTRY, FakeClock(), Metrics(), 1, Random(1))
    computed = await live.live({"ann": REGISTRY.full_mask, "bob": REGISTRY.full_mask})
    assert [computed[user_id][4].json for user_id in ("ann", "bob")] == [b"1", b"2"]


class Failing(ScriptedSource):
    """A source whose first feature fails for users named so, or takes too long."""

    def __init__(self) -> None:
        super().__init__(lambda asked, index: 5)
        self.broken = {"ann"}
        self.slow = False
        self.attempts: list[str] = []
        self.attempts_over = 0

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        self.errors = {
            (place, 0): "too bad" for place, row in enumerate(asked) if row.user_id in self.broken and row.mask & 1
        }
        self.overdue = 1 if self.errors and self.slow else 0
        return await super().compute(clock_ms, asked)

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """One statement on a connection of its own."""
        self.attempts.append(asked[0].user_id)
        try:
            return await self.compute(clock_ms, asked)
        finally:
            self.attempts_over += 1


class Paused:
    """A computation over a failing source, and its clock."""

    def __init__(self) -> None:
        self.source, self.clock = Failing(), FakeClock()
        self.computation = Computation(self.source, PAIR, self.clock, Metrics(), 1, Random(1))

    async def read(self, user_id: str) -> tuple[bytes, str | None]:
        """The failing feature of a user; the other one is always right."""
        computed = await self.computation.live({user_id: 3})
        found = outcomes(computed[user_id])
        assert found[1] == (b"5", None)
        return found[0]

    async def tried(self) -> None:
        """Return when an attempt under way is over."""
        await asyncio.sleep(0)  # it begins in the next turn of the loop
        await eventually(lambda: self.source.attempts_over == len(self.source.attempts))


async def test_slow_feature_is_paused_after_one_attempt() -> None:
    paused = Paused()
    paused.source.slow = True
    assert await paused.read("ann") == (b"null", "too bad")
    assert await paused.read("bob") == (b"null", "too bad")
    assert [row.mask for statement in paused.source.begun for row in statement] == [3, 2]
    (trouble,) = paused.computation.availability.troubles()
    assert (trouble.feature, trouble.reason) == ("one", "too bad")
    assert paused.source.attempts == []


async def test_paused_feature_is_retried_by_reads() -> None:
    paused = Paused()
    paused.source.slow = True
    await paused.read("ann")
    for attempts in (1, 1, 2):  # the second pause is twice as long
        paused.clock.advance(1_000)
        await paused.read("bob")
        await paused.tried()
        assert paused.source.attempts == ["ann"] * attempts
    paused.source.broken.clear()
    paused.clock.advance(4_000)
    assert await paused.read("bob") == (b"null", "too bad")  # nothing waits for the attempt
    await paused.tried()
    assert await paused.read("bob") == (b"5", None)
    assert paused.computation.availability.troubles() == []


async def test_feature_that_fails_for_one_user_is_computed_for_the_others() -> None:
    paused = Paused()
    for _ in range(5):
        assert await paused.read("ann") == (b"null", "too bad")
        assert [item.feature for item in paused.computation.availability.troubles()] == ["one"]
        assert await paused.read("bob") == (b"5", None)
        assert paused.computation.availability.troubles() == []


async def test_feature_that_fails_for_three_users_in_a_row_is_paused() -> None:
    paused = Paused()
    paused.source.broken = {"ann", "bob", "cid"}
    for user_id in ("ann", "ann", "bob", "cid"):
        assert (await paused.read(user_id))[1] == "too bad"
    assert await paused.read("dan") == (b"null", "too bad")
    assert paused.source.begun[-1][0].mask == 2


async def test_feature_is_tried_again_when_only_readiness_asks() -> None:
    paused = Paused()
    paused.source.slow = True
    await paused.read("ann")
    paused.source.broken.clear()
    paused.clock.advance(1_000)
    paused.computation.try_again()
    await paused.tried()
    assert await paused.read("ann") == (b"5", None)


async def test_attempt_ends_when_the_computation_is_closed() -> None:
    paused = Paused()
    paused.source.slow = True
    await paused.read("ann")
    paused.clock.advance(1_000)
    paused.source.open.clear()
    paused.computation.try_again()
    await eventually(lambda: paused.source.attempts == ["ann"])
    async with asyncio.timeout(PATIENCE_S):
        await paused.computation.close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()
