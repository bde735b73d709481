"""The fields of an event, and the messages about fields that break a rule."""

import json

import msgspec
import pytest

from app.errors import InvalidInput, Issue
from app.events.validation import decode_json, from_queue
from tests.support.events import feedback, payload, served

FEEDBACK_EVENT = feedback("ann", dwell_ms=7_200, offset_min=120, event_id="e-1")


def invalid(raw: bytes) -> list[Issue]:
    """The issues of a body that is valid JSON."""
    with pytest.raises(InvalidInput) as caught:
        decode_json(raw)
    assert caught.value.issues
    return list(caught.value.issues)


def issue(**changes: object) -> Issue:
    """The only issue of an event with these changes."""
    (only,) = invalid(json.dumps(payload(FEEDBACK_EVENT, **changes)).encode())
    return only


def test_optional_fields_are_null_when_they_are_left_out() -> None:
    (event,) = decode_json(json.dumps(payload(FEEDBACK_EVENT, dwell_ms=..., decision_id=...)).encode())
    assert event == msgspec.structs.replace(FEEDBACK_EVENT, dwell_ms=None)


@pytest.mark.parametrize("subject", ["signals.tip.opened", "", "SIGNALS.TIP.SERVED", ..., None, 5, ["x"]])
def test_event_is_refused_when_its_subject_is_unknown(subject: object) -> None:
    found = issue(subject=subject)
    assert (found.path, "unknown subject" in found.detail) == ("subject", isinstance(subject, str))
    assert "signals.tip.feedback or signals.tip.served" in found.detail


def test_event_is_refused_when_it_has_an_unknown_field() -> None:
    for name in ("mood", "Action", "a`b", "received_at_ms"):
        found = issue(**{name: 1})
        assert (found.path, "unknown field" in found.detail) == (name, True)


def test_event_is_refused_when_it_has_a_field_of_the_other_subject() -> None:
    (found,) = invalid(json.dumps(payload(served(), action="completed")).encode())
    assert (found.path, "unknown field" in found.detail) == ("action", True)


def test_event_is_refused_when_a_field_is_missing() -> None:
    for name in ("event_id", "user_id", "tip_id", "occurred_at", "action"):
        found = issue(**{name: ...})
        assert (found.path, found.detail.startswith("missing; allowed is ")) == (name, True)


BAD_IDS: dict[str, list[object]] = {
    "1 to 128 characters": ["", "x" * 129, "x" * 100_000, 5, True, ["a"]],
    "must not be . or ..": [".", ".."],
    "must not contain /": ["a/b"],
    "U+0000": ["a\x00"],
    "U+000D": ["a\r\nb"],
    "U+001B": ["\x1b[31m"],
    "U+0085": ["a\x85"],
}


@pytest.mark.parametrize("name", ["event_id", "user_id", "tip_id", "decision_id"])
def test_event_is_refused_when_an_id_breaks_a_rule(name: str) -> None:
    for reason, values in BAD_IDS.items():
        for value in values:
            found = issue(**{name: value})
            assert (found.path, reason in found.detail) == (name, True), value
            assert len(found.detail) < 300


def test_every_id_is_named_when_several_break_a_rule() -> None:
    found = invalid(json.dumps(payload(FEEDBACK_EVENT, event_id="a/b", user_id="..", tip_id="\x07")).encode())
    assert [item.path for item in found] == ["event_id", "user_id", "tip_id"]


def test_event_is_refused_when_its_time_is_invalid_or_has_no_offset() -> None:
    texts = ["2026-04-25T08:30:00", "2026-04-25", "2026-04-25T08:30:00+24:00", "2026-04-25T08:30:00+2", "yesterday", ""]
    for occurred_at in (*texts, "2026-02-30T08:30:00Z", "2026-04-25T25:00:00Z", 1_777_000_000, 1.5, None, True):
        found = issue(occurred_at=occurred_at)
        assert found.path == "occurred_at"
        assert "with its UTC offset, as 2026-04-25T08:30:00+02:00" in found.detail, occurred_at


def test_event_is_refused_when_its_action_is_unknown() -> None:
    for action in ("done", "", "COMPLETED", None, 1, True):
        found = issue(action=action)
        assert (found.path, "completed, dismissed or snoozed" in found.detail) == ("action", True), action


def with_dwell(number: str) -> bytes:
    return msgspec.json.encode(FEEDBACK_EVENT).replace(b"7200", number.encode())


def test_event_is_refused_when_its_dwell_time_is_no_whole_number_in_range() -> None:
    near = ("-1", "86400001", "86400001.0", "-1.0", "1.5", "true", '"7200"', "[]", "1e30", "1e400")
    for number in (*near, str(1 << 63), str(1 << 64), str(-(1 << 63) - 1), "9" * 400, "9" * 5_000):
        (found,) = invalid(with_dwell(number))
        assert found.path == "dwell_ms"
        assert "a whole number from 0 to 86400000" in found.detail, number[:22]


@pytest.mark.parametrize("number", ["7200.0", "7.2e3", "720000e-2"])
def test_whole_number_is_an_integer_however_it_is_written(number: str) -> None:
    raw = with_dwell(number)
    (event,) = decode_json(raw)
    assert event == FEEDBACK_EVENT
    assert type(getattr(event, "dwell_ms", None)) is int
    assert from_queue(json.loads(raw), "[0]") == FEEDBACK_EVENT


def test_other_fault_is_named_beside_a_float_integer() -> None:
    raw = with_dwell("7200.0").replace(b"completed", b"done")
    (found,) = invalid(raw)
    assert found.path == "action"


def test_dwell_time_is_accepted_when_it_is_at_its_bounds() -> None:
    for dwell_ms in (0, 86_400_000):
        (event,) = decode_json(json.dumps(payload(FEEDBACK_EVENT, dwell_ms=dwell_ms)).encode())
        assert getattr(event, "dwell_ms", None) == dwell_ms
