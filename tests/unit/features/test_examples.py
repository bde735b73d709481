"""Events of examples: as a producer would have sent them."""

from datetime import timedelta

import msgspec
import pytest

from app.features.clock import to_ms
from app.features.events import TipFeedback, TipServed
from app.features.examples import Example, events_of, feedback, served
from tests.support.clock import NOW_MS


def test_example_events_have_the_given_age() -> None:
    example = Example(events=[served(tip_id="t"), feedback("snoozed", ago=timedelta(days=3), dwell_ms=5)], value=1)
    first, second = events_of(example, NOW_MS, "ann")
    assert isinstance(first, TipServed)
    assert isinstance(second, TipFeedback)
    assert (first.user_id, first.tip_id, to_ms(first.occurred_at)) == ("ann", "t", NOW_MS - 3_600_000)
    assert (second.action, second.dwell_ms, to_ms(second.occurred_at)) == ("snoozed", 5, NOW_MS - 3 * 86_400_000)
    assert first.event_id != second.event_id


@pytest.mark.parametrize("ago", [timedelta(0), timedelta(hours=7), timedelta(minutes=90)])
def test_local_hour_is_the_one_asked_for(ago: timedelta) -> None:
    hours = range(24)
    example = Example(events=[served(ago=ago, local_hour=hour) for hour in hours], value=1)
    events = events_of(example, NOW_MS, "ann")
    assert [event.occurred_at.hour for event in events] == list(hours)
    assert {to_ms(event.occurred_at) for event in events} == {NOW_MS - ago // timedelta(milliseconds=1)}


def test_event_is_refused_when_its_action_is_unknown() -> None:
    with pytest.raises(msgspec.ValidationError, match="laughed"):
        events_of(Example(events=[feedback("laughed")], value=1), NOW_MS, "ann")
