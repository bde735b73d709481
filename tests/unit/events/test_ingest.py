"""Ingest on a real log: the fixed order, shared commits, and the errors that senders get."""

import asyncio

import msgspec
import pytest

from app.errors import Conflict, InvalidInput, Overloaded, StoreUnavailable
from app.events.ingest import BOUNDS, BOUNDS_OF
from app.events.ports import Appended
from app.events.validation import Batch, decode_json, decode_lines
from app.features.clock import DAY_MS
from app.features.events import FEEDBACK, SERVED
from app.stores.sql.database import Database
from app.stores.sql.registries import announce
from tests.support.clock import NOW_MS
from tests.support.database import column
from tests.support.events import body, feedback, served
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually
from tests.unit.events.recorders import IngestFixture

pytestmark = pytest.mark.both_engines


@pytest.fixture
async def fixture(database: Database) -> IngestFixture:
    await announce(database, REGISTRY, NOW_MS)
    return IngestFixture(database)


async def test_keys_are_dropped_after_the_commit_and_before_the_answer(fixture: IngestFixture) -> None:
    receipt = await fixture.ingest(served("ann"), feedback("ann"), served("bob"))
    assert fixture.journal == ["commit", "invalidate", "publish", "answer"]
    stale = {"ann": REGISTRY.invalidated_by(SERVED) | REGISTRY.invalidated_by(FEEDBACK)}
    stale["bob"] = REGISTRY.invalidated_by(SERVED)
    assert receipt == Appended(accepted=3, duplicates=0, invalidated=True, seqs=(1, 2, 3), stale=stale)
    assert fixture.invalidator.asked == [{"ann": set(REGISTRY.names), "bob": REGISTRY.invalidated_by(SERVED)}]
    assert fixture.publisher.published == [[1, 2, 3]]
    assert fixture.counted("accepted") == 3


async def test_request_is_answered_after_its_keys_are_dropped(fixture: IngestFixture) -> None:
    fixture.invalidator.open.clear()
    sending = asyncio.create_task(fixture.ingest(served(event_id="a")))
    await eventually(lambda: fixture.invalidator.asked)
    assert await fixture.stored() == ["a"]  # durable by then
    assert (fixture.journal, sending.done()) == (["commit"], False)
    fixture.invalidator.open.set()
    await sending
    assert fixture.journal == ["commit", "invalidate", "publish", "answer"]


@pytest.mark.parametrize("count", [1, 4, 5, 341, 599])
async def test_each_event_gets_its_number_in_a_shared_statement(fixture: IngestFixture, count: int) -> None:
    """They go in by the hundred, by the dozen and one by one."""
    events = [feedback(f"u{place}", dwell_ms=place, event_id=f"e{place}") for place in range(count)]
    receipt = await fixture.ingest(*events, served("ann", event_id="last"))
    assert receipt.seqs == tuple(range(1, count + 2))
    assert await fixture.stored() == [*(f"e{place}" for place in range(count)), "last"]
    sql = """SELECT log.event_id || ' ' || log.user_id || ' ' || fact.user_id || ' ' || fact.dwell_ms
             FROM event_log AS log JOIN tip_feedback AS fact USING (seq) ORDER BY seq"""
    assert await column(fixture.database, sql) == [f"e{place} u{place} u{place} {place}" for place in range(count)]


async def test_answer_says_so_when_keys_are_only_owed(fixture: IngestFixture) -> None:
    fixture.invalidator.result = False
    receipt = await fixture.ingest(served())
    assert (receipt.accepted, receipt.invalidated) == (1, False)
    assert fixture.publisher.published == [[1]]


async def test_keys_are_dropped_again_when_an_event_is_a_duplicate(fixture: IngestFixture) -> None:
    event = feedback("ann")
    await fixture.ingest(event)
    again = await fixture.ingest(event)
    stale = {"ann": REGISTRY.invalidated_by(FEEDBACK)}
    assert again == Appended(accepted=0, duplicates=1, invalidated=True, seqs=(), stale=stale)
    assert fixture.invalidator.asked == [{"ann": REGISTRY.invalidated_by(FEEDBACK)}] * 2
    assert (fixture.counted("accepted"), fixture.counted("duplicate")) == (1, 1)


async def test_requests_share_a_commit_and_a_drop_when_they_wait_together(fixture: IngestFixture) -> None:
    receipts = await asyncio.gather(*(fixture.ingest(served(f"user-{number % 3}")) for number in range(50)))
    assert fixture.log.commits == [[1] * 50]
    assert len(fixture.invalidator.asked) == 1
    assert sorted(seq for receipt in receipts for seq in receipt.seqs) == list(range(1, 51))


def test_commits_are_apart_when_events_come_by_the_queue() -> None:
    assert BOUNDS_OF["queue"].apart_s > 0


async def test_next_commit_does_not_wait_for_the_drop_of_the_one_before(fixture: IngestFixture) -> None:
    fixture.invalidator.open.clear()
    first = asyncio.create_task(fixture.ingest(served()))
    await eventually(lambda: len(fixture.invalidator.asked) == 1)
    second = asyncio.create_task(fixture.ingest(served()))
    await eventually(lambda: len(fixture.invalidator.asked) == 2)
    assert fixture.log.commits == [[1], [1]]
    fixture.invalidator.open.set()
    await asyncio.gather(first, second)


async def test_large_requests_are_committed_apart_when_they_exceed_the_cap(fixture: IngestFixture) -> None:
    fixture = IngestFixture(fixture.database, BOUNDS._replace(at_once=5))
    sizes = (3, 2, 1, 7, 1)
    await asyncio.gather(*(fixture.ingest(*(served() for _ in range(size))) for size in sizes))
    assert fixture.log.commits == [[3, 2], [1], [7], [1]]


async def test_request_is_shed_when_too_many_events_wait(fixture: IngestFixture) -> None:
    fixture = IngestFixture(fixture.database, BOUNDS._replace(most=3))
    outcomes = await asyncio.gather(
        *(fixture.ingest(served(event_id=f"{number}-a"), served(event_id=f"{number}-b")) for number in range(2)),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], Appended)
    assert isinstance(outcomes[1], Overloaded)
    assert (await fixture.ingest(served(event_id="c"))).accepted == 1
    assert await fixture.stored() == ["0-a", "0-b", "c"]


async def test_only_that_request_is_refused_when_one_of_several_conflicts(fixture: IngestFixture) -> None:
    await fixture.ingest(feedback("ann", event_id="a"))
    fixture.journal.clear()
    good, clash, better = await asyncio.gather(
        fixture.ingest(served("bob", event_id="b")),
        fixture.ingest(served("cid", event_id="c"), feedback("ann", action="snoozed", event_id="a")),
        fixture.ingest(served("dan", event_id="d")),
        return_exceptions=True,
    )
    assert isinstance(good, Appended)
    assert isinstance(better, Appended)
    assert isinstance(clash, Conflict)
    assert "'a'" in str(clash)
    assert [issue.path for issue in clash.issues] == ["[1].event_id"]
    assert fixture.log.commits[-1] == [1, 2, 1]
    assert await fixture.stored() == ["a", "b", "d"]
    assert set(fixture.invalidator.asked[-1]) == {"bob", "dan"}
    assert fixture.counted("conflict") == 2


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        (decode_json(msgspec.json.encode(served("ann", event_id="a", tip_id="other"))), "event_id"),
        (decode_json(body(served("ann", event_id="a", tip_id="other"))), "[0].event_id"),
        (decode_lines(b"\n\n" + msgspec.json.encode(served("ann", event_id="a", tip_id="other"))), "line 3.event_id"),
    ],
    ids=["alone", "array", "lines"],
)
async def test_conflict_names_the_place_as_the_sender_knows_it(fixture: IngestFixture, batch: Batch, path: str) -> None:
    await fixture.ingest(served("ann", event_id="a"))
    with pytest.raises(Conflict) as caught:
        await fixture.ingestor.ingest(batch)
    assert [issue.path for issue in caught.value.issues] == [path]


async def test_nothing_is_stored_when_one_time_of_a_request_is_refused(fixture: IngestFixture) -> None:
    with pytest.raises(InvalidInput):
        await fixture.ingest(served(), served(at_ms=NOW_MS + DAY_MS), served())
    assert (await fixture.stored(), fixture.journal) == ([], [])
    assert fixture.counted("refused") == 3


async def test_event_is_finished_when_its_sender_goes_away(fixture: IngestFixture) -> None:
    fixture.invalidator.open.clear()
    leaving = asyncio.create_task(fixture.ingest(served(event_id="left")))
    staying = asyncio.create_task(fixture.ingest(served(event_id="stayed")))
    await eventually(lambda: fixture.invalidator.asked)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    fixture.invalidator.open.set()
    assert (await staying).accepted == 1
    assert sorted(map(str, await fixture.stored())) == ["left", "stayed"]
    assert fixture.publisher.published == [[1, 2]]


async def test_event_is_finished_when_its_sender_goes_away_before_the_commit(fixture: IngestFixture) -> None:
    fixture.log.open.clear()
    leaving = asyncio.create_task(fixture.ingest(served(event_id="left")))
    await eventually(lambda: fixture.log.begun)
    leaving.cancel()
    fixture.log.open.set()
    await eventually(lambda: fixture.publisher.published)
    assert await fixture.stored() == ["left"]
    assert leaving.cancelled()


async def test_sender_may_retry_when_the_owed_row_fails(fixture: IngestFixture) -> None:
    event = feedback("ann", event_id="a")
    fixture.invalidator.failure = StoreUnavailable("locked")
    outcomes = await asyncio.gather(fixture.ingest(event), fixture.ingest(served("bob")), return_exceptions=True)
    assert [str(error) for error in outcomes] == ["locked", "locked"]
    assert fixture.publisher.published == []
    assert len(await fixture.stored()) == 2  # the sweep would take them up

    fixture.invalidator.failure = None
    again = await fixture.ingest(event)
    stale = {"ann": REGISTRY.invalidated_by(FEEDBACK)}
    assert again == Appended(accepted=0, duplicates=1, invalidated=True, seqs=(), stale=stale)
    assert fixture.invalidator.asked[-1] == {"ann": REGISTRY.invalidated_by(FEEDBACK)}


async def test_all_waiting_requests_fail_when_the_commit_fails(fixture: IngestFixture) -> None:
    event = served(event_id="a")
    fixture.log.failure = StoreUnavailable("disk full")
    outcomes = await asyncio.gather(fixture.ingest(event), fixture.ingest(served()), return_exceptions=True)
    assert [str(error) for error in outcomes] == ["disk full", "disk full"]
    assert (fixture.journal, fixture.invalidator.asked) == ([], [])
    fixture.log.failure = None
    assert (await fixture.ingest(event)).accepted == 1


async def test_everything_begun_is_finished_when_the_ingestor_closes(fixture: IngestFixture) -> None:
    fixture.invalidator.open.clear()
    sending = [asyncio.create_task(fixture.ingest(served())) for _ in range(3)]
    await eventually(lambda: fixture.invalidator.asked)
    closing = asyncio.create_task(fixture.ingestor.close())
    fixture.invalidator.open.set()
    await closing
    assert fixture.publisher.published == [[1, 2, 3]]
    assert [receipt.accepted for receipt in await asyncio.gather(*sending)] == [1, 1, 1]


async def test_times_of_a_commit_are_measured_when_events_are_stored(fixture: IngestFixture) -> None:
    await fixture.ingest(served(), served())
    value = fixture.metrics.collectors.get_sample_value
    assert value("profiles_commit_events_sum") == 2
    assert value("profiles_commit_seconds_count") == 1
