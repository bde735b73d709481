"""A logged event equals the event that was sent."""

from __future__ import annotations

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.events.admission import Admission, digest
from app.events.ports import Admitted, Appended
from app.features.clock import DAY_MS
from app.features.events import Action, TipEvent
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.clock import NOW_MS
from tests.support.events import admitted, feedback, local_time, served


async def append(log: SqliteEventLog, *events: TipEvent) -> Appended:
    """Store one request."""
    (outcome,) = await log.append([[admitted(event) for event in events]])
    assert isinstance(outcome, Appended)
    return outcome


ids = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=20)


actions = st.sampled_from(Action)


times = st.builds(local_time, st.integers(NOW_MS - DAY_MS, NOW_MS), st.integers(-1439, 1439))


decisions = st.one_of(st.none(), ids)


@st.composite
def sent_events(draw: st.DrawFn) -> TipEvent:
    """An event with whatever a producer may put in."""
    at = draw(times)
    changes = {"tip_id": draw(ids), "occurred_at": at, "decision_id": draw(decisions)}
    if draw(st.booleans()):
        return msgspec.structs.replace(served(draw(ids)), **changes)
    dwell_ms = draw(st.one_of(st.none(), st.integers(0, 86_400_000)))
    return msgspec.structs.replace(feedback(draw(ids), action=draw(actions), dwell_ms=dwell_ms), **changes)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sent_events(), min_size=1, max_size=5))
async def test_logged_event_equals_the_event_sent(event_log: SqliteEventLog, sent: list[TipEvent]) -> None:
    seqs = (await append(event_log, *sent)).seqs
    logged = await event_log.logged(seqs)
    assert [item.event for item in logged] == sent
    assert [item.event.occurred_at.utcoffset() for item in logged] == [event.occurred_at.utcoffset() for event in sent]
    assert {(item.received_at_ms, item.attempts) for item in logged} == {(NOW_MS, 0)}
    # So an event that is read back and sent again is a duplicate.
    again = await append(event_log, *(item.event for item in logged))
    assert (again.accepted, again.duplicates) == (0, len(sent))


async def test_logged_time_is_the_producers_when_the_event_counts_from_its_arrival(event_log: SqliteEventLog) -> None:
    early = feedback(at_ms=NOW_MS + 4 * 60_000, offset_min=345)
    await event_log.append([Admission(retention_days=180).admit([early], NOW_MS)])
    (logged,) = await event_log.logged([1])
    assert logged.event == early


async def test_event_is_the_same_when_only_digits_below_a_millisecond_differ(event_log: SqliteEventLog) -> None:
    exact = served(event_id="a")
    finer = msgspec.structs.replace(exact, occurred_at=exact.occurred_at.replace(microsecond=999))
    assert digest(exact) == digest(finer)
    items: list[Admitted] = Admission(retention_days=180).admit([finer], NOW_MS)
    await event_log.append([items])
    (logged,) = await event_log.logged([1])
    assert logged.event == exact
    assert (await append(event_log, logged.event)).duplicates == 1
