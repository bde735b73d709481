"""The event time that counts, which times are refused, and when two events are the same."""

from __future__ import annotations

import json

import msgspec
import pytest

from app.errors import InvalidInput, Issue
from app.events.validation import FUTURE_TOLERANCE_MS, admit, decode_json, decode_lines, digest
from app.features.clock import DAY_MS, rfc3339
from app.features.events import TipEvent
from tests.support.clock import NOW_MS
from tests.support.events import admitted, body, feedback, local_time, payload, served

FEEDBACK_EVENT = feedback("ann", dwell_ms=7_200, offset_min=120, event_id="e-1")
SENT = payload(FEEDBACK_EVENT)


def admit_one(event: TipEvent, now_ms: int = NOW_MS) -> Issue | None:
    """The issue of an event's time, if any."""
    try:
        admit([event], now_ms, 180)
    except InvalidInput as error:
        (only,) = error.issues
        return only
    return None


def test_event_counts_at_its_own_time_when_that_is_past_or_present() -> None:
    for at_ms in (NOW_MS, NOW_MS - 1, NOW_MS - 180 * DAY_MS):
        (item,) = admit([feedback(at_ms=at_ms, offset_min=-210)], NOW_MS, 180)
        assert (item.occurred_at_ms, item.claimed_at_ms, item.received_at_ms) == (at_ms, None, NOW_MS)
        assert item.utc_offset_min == -210


def test_event_counts_at_its_arrival_when_slightly_ahead() -> None:
    for ahead_ms in (1, 4 * 60_000, FUTURE_TOLERANCE_MS):
        (item,) = admit([served(at_ms=NOW_MS + ahead_ms)], NOW_MS, 180)
        assert (item.occurred_at_ms, item.claimed_at_ms, item.received_at_ms) == (NOW_MS, NOW_MS + ahead_ms, NOW_MS)


def test_event_is_refused_when_it_is_more_than_five_minutes_ahead() -> None:
    found = admit_one(served(at_ms=NOW_MS + 5 * 60_000 + 1))
    assert found is not None
    assert found.path == "occurred_at"
    assert "more than five minutes ahead" in found.detail
    assert rfc3339(NOW_MS) in found.detail


def test_event_is_refused_when_it_is_older_than_what_is_kept() -> None:
    assert admit_one(served(at_ms=NOW_MS - 180 * DAY_MS)) is None
    found = admit_one(served(at_ms=NOW_MS - 180 * DAY_MS - 1))
    assert found is not None
    assert (found.path, "180 days" in found.detail) == ("occurred_at", True)


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59"])
def test_event_is_refused_when_its_time_is_at_the_end_of_the_calendar(year: str) -> None:
    (event,) = decode_json(json.dumps(payload(FEEDBACK_EVENT, occurred_at=year)).encode())
    assert admit_one(event) is not None


def test_every_event_is_named_by_its_place_when_several_times_are_refused() -> None:
    sound, early = FEEDBACK_EVENT, served(at_ms=NOW_MS + DAY_MS)

    def paths(events: list[TipEvent]) -> list[str]:
        with pytest.raises(InvalidInput) as caught:
            admit(events, NOW_MS, 180)
        return [issue.path for issue in caught.value.issues]

    encoded = [msgspec.json.encode(event) for event in (early, sound, early)]
    assert paths([early, sound, early]) == ["[0].occurred_at", "[2].occurred_at"]
    assert paths(decode_json(b"[" + b",".join(encoded) + b"]")) == ["[0].occurred_at", "[2].occurred_at"]
    assert paths(decode_json(body(early))) == ["[0].occurred_at"]
    assert paths(decode_json(encoded[0])) == ["occurred_at"]
    # Blank lines count: an editor shows the same numbers.
    assert paths(decode_lines(b"\n\n".join(encoded))) == ["line 1.occurred_at", "line 5.occurred_at"]


def test_digest_tells_whether_content_is_the_same() -> None:
    same = [
        json.dumps(SENT),
        json.dumps(dict(reversed(SENT.items())), indent=2),
        json.dumps(SENT).replace("14:00:00+", "14:00:00.000+"),
        json.dumps(SENT).replace("14:00:00+", "14:00:00.0009+"),
        json.dumps(SENT).replace('"decision_id": null, ', ""),
    ]
    assert "14:00:00+02:00" in same[0]
    digests = {digest(event) for text in same for event in decode_json(text.encode())}
    assert len(digests) == 1
    other = json.dumps(SENT).replace("14:00:00+02:00", "12:00:00Z")  # the same instant, another local hour
    assert digest(decode_json(other.encode())[0]) not in digests


def test_builder_of_the_tests_admits_as_the_service_does() -> None:
    event = feedback(at_ms=NOW_MS - 5, offset_min=345)
    assert admit([event], NOW_MS, 180, "a producer") == [admitted(event)]
    assert event.occurred_at == local_time(NOW_MS - 5)
