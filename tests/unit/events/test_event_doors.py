"""Every door gives the same events, and whatever is sent is an event or refused with a reason."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidInput, Issue, Undecodable
from app.events.validation import admit, decode_json, decode_lines, from_queue
from app.features.clock import to_ms
from app.features.events import Action
from tests.support.clock import NOW_MS
from tests.support.events import feedback, payload

FEEDBACK_EVENT = feedback("ann", dwell_ms=7_200, offset_min=120, event_id="e-1")
SENT = payload(FEEDBACK_EVENT)
ids = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=128).filter(
    lambda text: text not in (".", "..")
)
offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(2026, 1, 1), datetime(2026, 4, 24), timezones=offsets)  # noqa: DTZ001  # naive bounds
EVENT_FIELDS = {"event_id": ids, "user_id": ids, "tip_id": ids, "occurred_at": moments}
OPTIONAL_FIELDS = {"decision_id": st.one_of(st.none(), ids)}
FEEDBACK_FIELDS = {
    **EVENT_FIELDS,
    "action": st.sampled_from([action.value for action in Action]),
    "subject": st.just("signals.tip.feedback"),
}
valid_payloads = st.one_of(
    st.fixed_dictionaries({**EVENT_FIELDS, "subject": st.just("signals.tip.served")}, optional=OPTIONAL_FIELDS),
    st.fixed_dictionaries(
        FEEDBACK_FIELDS, optional={**OPTIONAL_FIELDS, "dwell_ms": st.one_of(st.none(), st.integers(0, 86_400_000))}
    ),
)


@given(st.lists(valid_payloads, min_size=1, max_size=5))
def test_valid_events_round_trip_through_every_door(sent: list[dict[str, object]]) -> None:
    texts = [json.dumps({**item, "occurred_at": str(item["occurred_at"])}).encode() for item in sent]
    by_array = decode_json(b"[" + b",".join(texts) + b"]")
    by_lines = decode_lines(b"\n".join(texts))
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.to_builtins(by_array)))
    by_queue = [from_queue(item, f"[{index}]") for index, item in enumerate(packed)]
    assert by_array == by_lines == by_queue == [event for text in texts for event in decode_json(text)]
    for item, event in zip(sent, by_array, strict=True):
        assert {name: getattr(event, name, value) for name, value in item.items()} == item
        assert event.occurred_at.utcoffset() == item["occurred_at"].utcoffset()  # type: ignore[attr-defined]  # a datetime
    assert [item.occurred_at_ms for item in admit(by_array, NOW_MS, 180)] == [
        to_ms(event.occurred_at) for event in by_array
    ]


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just(datetime.now(UTC))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(), st.integers()), inner)),
    max_leaves=10,
)


def refusal_of(anything: object) -> tuple[Issue, ...] | None:
    """What the queue's door says of a payload; None where it is an event."""
    try:
        from_queue(anything, "[0]")
    except InvalidInput as error:
        return error.issues
    return None


@given(valid_payloads)
def test_time_without_an_offset_is_refused(sent: dict[str, object]) -> None:
    (issue,) = refusal_of(msgspec.msgpack.decode(msgspec.msgpack.encode(sent))) or ()
    assert issue.path == "[0].occurred_at"
    assert "msgpack timestamp" in issue.detail


@given(st.one_of(json_like, st.fixed_dictionaries(dict.fromkeys(SENT, json_like))))
@pytest.mark.slow
def test_payload_of_the_queue_is_an_event_or_refused_with_a_reason(anything: object) -> None:
    issues = refusal_of(anything)
    assert issues != ()
    assert all(issue.path.startswith("[0]") and issue.detail for issue in issues or ())


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_body_is_decoded_or_refused_when_it_is_anything(raw: bytes) -> None:
    for decode in (decode_json, decode_lines):
        with pytest.raises((Undecodable, InvalidInput)):
            decode(raw)


def test_payload_of_the_queue_is_refused_when_an_id_holds_a_lone_surrogate() -> None:
    with pytest.raises(InvalidInput) as caught:
        from_queue(payload(FEEDBACK_EVENT, user_id="a\ud800"), "[3]")
    assert [(issue.path, "U+D800" in issue.detail) for issue in caught.value.issues] == [("[3].user_id", True)]


def test_payload_of_the_queue_is_refused_when_a_number_is_not_finite() -> None:
    with pytest.raises(InvalidInput):
        from_queue(payload(FEEDBACK_EVENT, dwell_ms=math.nan), "[0]")
