"""The event log: duplicates, sequence numbers, stale features, consumption, pruning, and exact decoding."""

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import StoreUnavailable
from app.events.ports import Admitted, Appended, ClashingEvent
from app.events.validation import admit, digest
from app.features.clock import DAY_MS
from app.features.events import FEEDBACK, SERVED, Action, TipEvent
from app.features.registry import Registry
from app.stores.sql.database import Database
from app.stores.sql.event_log import SqlEventLog
from app.stores.sql.registries import announce
from app.stores.sql.users import SqlUsers
from tests.support.clock import NOW_MS
from tests.support.database import column, log_of, open_again
from tests.support.entries import entry
from tests.support.events import admitted, feedback, local_time, served
from tests.support.registry import REGISTRY

pytestmark = pytest.mark.both_engines


async def append(log: SqlEventLog, *events: TipEvent) -> Appended:
    (outcome,) = await log.append([[admitted(event) for event in events]])
    assert isinstance(outcome, Appended)
    return outcome


async def stored_ids(database: Database) -> list[object]:
    """The ids of the logged events, in order. Checks that each has its fact."""
    facts = await column(database, "SELECT seq FROM tip_views UNION ALL SELECT seq FROM tip_feedback ORDER BY seq")
    assert facts == await column(database, "SELECT seq FROM event_log ORDER BY seq")
    return await column(database, "SELECT event_id FROM event_log ORDER BY seq")


async def test_events_are_numbered_in_order_when_they_are_new(database: Database, event_log: SqlEventLog) -> None:
    first = await append(event_log, served(event_id="a"), feedback(event_id="b"))
    second = await append(event_log, served(event_id="c"))
    assert (first.accepted, first.duplicates, first.seqs) == (2, 0, (1, 2))
    assert (second.accepted, second.duplicates, second.seqs) == (1, 0, (3,))
    assert await stored_ids(database) == ["a", "b", "c"]


async def test_event_is_a_duplicate_when_it_is_sent_again(database: Database, event_log: SqlEventLog) -> None:
    event = feedback(event_id="a", dwell_ms=5)
    await announce(database, REGISTRY, NOW_MS)
    first = await append(event_log, event)
    again = await append(event_log, event)
    assert (again.accepted, again.duplicates, again.seqs) == (0, 1, ())
    assert again.stale == first.stale == {"ann": REGISTRY.invalidated_by(FEEDBACK)}
    assert await stored_ids(database) == ["a"]


async def test_event_is_a_duplicate_when_a_request_repeats_it(database: Database, event_log: SqlEventLog) -> None:
    event = served(event_id="a")
    outcome = await append(event_log, event, served(event_id="b"), event)
    assert (outcome.accepted, outcome.duplicates, outcome.seqs) == (2, 1, (1, 2))
    assert await stored_ids(database) == ["a", "b"]


async def test_event_is_a_duplicate_when_the_same_commit_stores_it(database: Database, event_log: SqlEventLog) -> None:
    event = admitted(served(event_id="a"))
    first, second = await event_log.append([[event], [event, admitted(served(event_id="b"))]])
    assert isinstance(first, Appended)
    assert isinstance(second, Appended)
    assert (first.seqs, second.seqs, second.duplicates) == ((1,), (2,), 1)


async def test_event_of_another_user_is_no_duplicate_when_its_id_is_the_same(
    database: Database, event_log: SqlEventLog
) -> None:
    outcome = await append(event_log, served("ann", event_id="a"), served("bob", event_id="a"))
    assert (outcome.accepted, outcome.duplicates, outcome.seqs) == (2, 0, (1, 2))
    outcome = await append(event_log, feedback("cid", event_id="a"), served("ann", event_id="a"))
    assert (outcome.accepted, outcome.duplicates, outcome.seqs) == (1, 1, (3,))
    assert await stored_ids(database) == ["a", "a", "a"]


CHANGED: list[TipEvent] = [
    feedback(event_id="a", tip_id="other"),
    feedback(event_id="a", action="snoozed"),
    feedback(event_id="a", dwell_ms=0),
    feedback(event_id="a", decision_id="d"),
    feedback(event_id="a", at_ms=NOW_MS - 1),
    feedback(event_id="a", offset_min=60),
    served("ann", event_id="a"),
]


@pytest.mark.parametrize("changed", CHANGED, ids=range(len(CHANGED)))
async def test_request_is_rejected_when_an_id_has_other_content(
    database: Database, event_log: SqlEventLog, changed: TipEvent
) -> None:
    await append(event_log, feedback(event_id="a"))
    requests = [
        [admitted(served(event_id="before"))],
        [admitted(served(event_id="beside")), admitted(changed), admitted(served(event_id="behind"))],
        [admitted(served(event_id="after"))],
    ]
    before, clash, after = await event_log.append(requests)
    assert clash == ClashingEvent(1, "a")
    assert isinstance(before, Appended)
    assert isinstance(after, Appended)
    assert await stored_ids(database) == ["a", "before", "after"]
    assert before.seqs + after.seqs == (2, 3)


async def test_request_is_rejected_when_it_contradicts_itself(database: Database, event_log: SqlEventLog) -> None:
    request = [admitted(feedback(event_id="a")), admitted(feedback(event_id="a", action="snoozed"))]
    assert await event_log.append([request]) == [ClashingEvent(1, "a")]
    assert await stored_ids(database) == []


async def test_nothing_is_stored_when_one_row_cannot_be_written(database: Database, event_log: SqlEventLog) -> None:
    broken = admitted(feedback(event_id="b", dwell_ms=-1))  # admission would reject it; here the schema does
    with pytest.raises(Exception, match=r"(?i)check constraint"):
        await event_log.append([[admitted(served(event_id="a"))], [broken]])
    assert await stored_ids(database) == []
    await append(event_log, served(event_id="c"))
    assert await stored_ids(database) == ["c"]


@pytest.mark.parametrize("how", ["prune", "erase"])
async def test_sequence_numbers_rise_after_events_were_deleted(
    database: Database, event_log: SqlEventLog, how: str
) -> None:
    assert (await append(event_log, served("ann"), feedback("ann"))).seqs == (1, 2)
    if how == "prune":
        assert await event_log.prune(NOW_MS + 1, limit=100) == 2
    else:
        assert (await SqlUsers(database).erase("ann", 1)).events == 2
    assert await stored_ids(database) == []
    reopened = await open_again(database)
    try:
        (seq,) = (await append(log_of(reopened), served("ann"))).seqs
    finally:
        await reopened.close()
    assert seq == 3


async def test_stale_features_are_those_of_all_announced_registries(database: Database, event_log: SqlEventLog) -> None:
    await announce(database, REGISTRY, NOW_MS)
    await announce(database, Registry([entry(name="of_the_next_release", invalidated_by=(SERVED,))]), NOW_MS)
    outcome = await append(event_log, served("ann"), served("bob"), feedback("bob"))
    views = {"tip_volume_30d", "of_the_next_release"}
    assert outcome.stale == {"ann": views, "bob": views | REGISTRY.invalidated_by(FEEDBACK)}
    assert await event_log.stale_features() == {
        SERVED: views,
        FEEDBACK: REGISTRY.invalidated_by(FEEDBACK),
    }


async def test_users_are_stale_when_no_feature_is_announced(event_log: SqlEventLog) -> None:
    assert (await append(event_log, served("ann"))).stale == {"ann": frozenset()}


async def test_unconsumed_events_are_ordered_by_arrival(
    event_log: SqlEventLog,
) -> None:
    arrivals = [("c", 3), ("a", 1), ("b", 2), ("late", 10)]
    await event_log.append([[admitted(served(event_id=name), NOW_MS + ms) for name, ms in arrivals]])
    taken = await event_log.unconsumed(NOW_MS + 10, limit=10)
    assert [item.event.event_id for item in taken] == ["a", "b", "c"]
    assert [item.received_at_ms - NOW_MS for item in taken] == [1, 2, 3]
    assert [item.event.event_id for item in await event_log.unconsumed(NOW_MS + 10, limit=2)] == ["a", "b"]


async def test_consumed_events_are_not_unconsumed_again(event_log: SqlEventLog) -> None:
    seqs = (await append(event_log, served(), served(), served())).seqs
    await event_log.mark_consumed(seqs[:2])
    await event_log.mark_consumed([*seqs[:1], 999])
    assert [item.seq for item in await event_log.logged([3, 2, 1, 999])] == [3]
    assert [item.seq for item in await event_log.unconsumed(NOW_MS + 1, 10)] == [3]


async def test_pruning_deletes_the_oldest_events_first(database: Database, event_log: SqlEventLog) -> None:
    ages = {"d": 4, "b": 2, "c": 3, "a": 1}  # days since 2026-04-20; out of order on purpose
    await append(event_log, *(feedback(event_id=name, at_ms=NOW_MS + day * DAY_MS) for name, day in ages.items()))
    before_ms = NOW_MS + 4 * DAY_MS
    assert await event_log.prune(before_ms, limit=2) == 2
    assert await stored_ids(database) == ["d", "c"]
    assert await event_log.prune(before_ms, limit=2) == 1
    assert await event_log.prune(before_ms, limit=2) == 0
    assert await stored_ids(database) == ["d"]  # it occurred exactly at the cutoff


async def test_log_raises_when_the_database_is_closed(database: Database, event_log: SqlEventLog) -> None:
    await database.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await append(event_log, served())


ids = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=20)
actions = st.sampled_from(Action)
times = st.builds(local_time, st.integers(NOW_MS - DAY_MS, NOW_MS), st.integers(-1439, 1439))
decisions = st.one_of(st.none(), ids)


@st.composite
def sent_events(draw: st.DrawFn) -> TipEvent:
    """Any event that a producer may send."""
    at = draw(times)
    changes = {"tip_id": draw(ids), "occurred_at": at, "decision_id": draw(decisions)}
    if draw(st.booleans()):
        return msgspec.structs.replace(served(draw(ids)), **changes)
    dwell_ms = draw(st.one_of(st.none(), st.integers(0, 86_400_000)))
    return msgspec.structs.replace(feedback(draw(ids), action=draw(actions), dwell_ms=dwell_ms), **changes)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sent_events(), min_size=1, max_size=5))
async def test_logged_event_equals_the_event_sent(event_log: SqlEventLog, sent: list[TipEvent]) -> None:
    seqs = (await append(event_log, *sent)).seqs
    logged = await event_log.logged(seqs)
    assert [item.event for item in logged] == sent
    assert [item.event.occurred_at.utcoffset() for item in logged] == [event.occurred_at.utcoffset() for event in sent]
    assert {(item.received_at_ms, item.attempts) for item in logged} == {(NOW_MS, 0)}
    again = await append(event_log, *(item.event for item in logged))
    assert (again.accepted, again.duplicates) == (0, len(sent))


async def test_logged_time_is_the_claimed_time_when_it_lies_ahead(event_log: SqlEventLog) -> None:
    early = feedback(at_ms=NOW_MS + 4 * 60_000, offset_min=345)
    await event_log.append([admit([early], NOW_MS, 180)])
    (logged,) = await event_log.logged([1])
    assert logged.event == early


async def test_times_are_compared_to_the_millisecond(event_log: SqlEventLog) -> None:
    exact = served(event_id="a")
    finer = msgspec.structs.replace(exact, occurred_at=exact.occurred_at.replace(microsecond=999))
    assert digest(exact) == digest(finer)
    items: list[Admitted] = admit([finer], NOW_MS, 180)
    await event_log.append([items])
    (logged,) = await event_log.logged([1])
    assert logged.event == exact
    assert (await append(event_log, logged.event)).duplicates == 1
