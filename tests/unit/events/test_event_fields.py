"""Which fields an event has, and what a producer is told of those that break a rule."""

from __future__ import annotations

import json

import msgspec
import pytest

from app.errors import InvalidInput, Issue
from app.events.validation import decode_json, from_queue
from tests.support.events import feedback, payload, served

FEEDBACK_EVENT = feedback("ann", dwell_ms=7_200, offset_min=120, event_id="e-1")


def invalid(raw: bytes) -> list[Issue]:
    """What is wrong with a body that can be read."""
    with pytest.raises(InvalidInput) as caught:
        decode_json(raw)
    assert caught.value.issues
    return list(caught.value.issues)


def issue(**changes: object) -> Issue:
    """The one thing wrong with an event, changed so."""
    (only,) = invalid(json.dumps(payload(FEEDBACK_EVENT, **changes)).encode())
    return only


def test_optional_fields_are_null_when_they_are_left_out() -> None:
    (event,) = decode_json(json.dumps(payload(FEEDBACK_EVENT, dwell_ms=..., decision_id=...)).encode())
    assert event == msgspec.structs.replace(FEEDBACK_EVENT, dwell_ms=None)


@pytest.mark.parametrize("subject", ["signals.tip.opened", "", "SIGNALS.TIP.SERVED"])
def test_event_is_refused_when_its_subject_is_unknown(subject: str) -> None:
    found = issue(subject=subject)
    assert found.path == "subject"
    assert "unknown subject" in found.detail
    assert "signals.tip.feedback or signals.tip.served" in found.detail


@pytest.mark.parametrize("subject", [..., None, 5, ["signals.tip.served"]])
def test_event_is_refused_when_it_has_no_subject(subject: object) -> None:
    found = issue(subject=subject)
    assert found.path == "subject"
    assert "signals.tip.feedback or signals.tip.served" in found.detail


@pytest.mark.parametrize("name", ["mood", "Action", "a`b", "received_at_ms"])
def test_event_is_refused_when_it_has_an_unknown_field(name: str) -> None:
    found = issue(**{name: 1})
    assert found.path == name
    assert "unknown field" in found.detail


def test_event_is_refused_when_it_has_a_field_of_the_other_subject() -> None:
    (found,) = invalid(json.dumps(payload(served(), action="completed")).encode())
    assert (found.path, "unknown field" in found.detail) == ("action", True)


@pytest.mark.parametrize("name", ["event_id", "user_id", "tip_id", "occurred_at", "action"])
def test_event_is_refused_when_a_field_is_missing(name: str) -> None:
    found = issue(**{name: ...})
    assert found.path == name
    assert found.detail.startswith("missing; allowed is ")


@pytest.mark.parametrize("name", ["event_id", "user_id", "tip_id", "decision_id"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "1 to 128 characters"),
        ("x" * 129, "1 to 128 characters"),
        ("x" * 100_000, "1 to 128 characters"),
        (".", "must not be . or .."),
        ("..", "must not be . or .."),
        ("a/b", "must not contain /"),
        ("a\x00", "U+0000"),
        ("a\r\nb", "U+000D"),
        ("\x1b[31m", "U+001B"),
        ("a\x85", "U+0085"),
        (5, "1 to 128 characters"),
        (True, "1 to 128 characters"),
        (["a"], "1 to 128 characters"),
    ],
)
def test_event_is_refused_when_an_id_breaks_a_rule(name: str, value: object, reason: str) -> None:
    found = issue(**{name: value})
    assert found.path == name
    assert reason in found.detail
    assert len(found.detail) < 300


def test_every_id_is_named_when_several_break_a_rule() -> None:
    found = invalid(json.dumps(payload(FEEDBACK_EVENT, event_id="a/b", user_id="..", tip_id="\x07")).encode())
    assert [item.path for item in found] == ["event_id", "user_id", "tip_id"]


@pytest.mark.parametrize(
    "occurred_at",
    [
        "2026-04-25T08:30:00",
        "2026-04-25",
        "2026-04-25T08:30:00+24:00",
        "2026-04-25T08:30:00+2",
        "2026-02-30T08:30:00Z",
        "2026-04-25T25:00:00Z",
        "yesterday",
        "",
        1_777_000_000,
        1_777_000_000.5,
        None,
        True,
    ],
)
def test_event_is_refused_when_its_time_is_none_or_has_no_offset(occurred_at: object) -> None:
    found = issue(occurred_at=occurred_at)
    assert found.path == "occurred_at"
    assert "with its UTC offset, as 2026-04-25T08:30:00+02:00" in found.detail


@pytest.mark.parametrize("action", ["done", "", "COMPLETED", None, 1, True])
def test_event_is_refused_when_its_action_is_unknown(action: object) -> None:
    found = issue(action=action)
    assert found.path == "action"
    assert "completed, dismissed or snoozed" in found.detail


@pytest.mark.parametrize(
    "number",
    [
        *("-1", "86400001", "86400001.0", "-1.0", "1.5", "true", '"7200"', "[]", "1e30", "1e400"),
        *(str(1 << 63), str(1 << 64), str(-(1 << 63) - 1), "9" * 400, "9" * 5_000),
    ],
    ids=lambda number: number[:22],
)
def test_event_is_refused_when_its_dwell_time_is_no_whole_number_in_range(number: str) -> None:
    raw = msgspec.json.encode(FEEDBACK_EVENT).replace(b"7200", number.encode())
    (found,) = invalid(raw)
    assert found.path == "dwell_ms"
    assert "a whole number from 0 to 86400000" in found.detail


@pytest.mark.parametrize("number", ["7200.0", "7.2e3", "720000e-2"])
def test_whole_number_is_an_integer_however_it_is_written(number: str) -> None:
    raw = msgspec.json.encode(FEEDBACK_EVENT).replace(b"7200", number.encode())
    (event,) = decode_json(raw)
    assert event == FEEDBACK_EVENT
    assert type(getattr(event, "dwell_ms", None)) is int
    assert from_queue(json.loads(raw), "[0]") == FEEDBACK_EVENT


def test_other_fault_is_named_beside_a_float_integer() -> None:
    raw = msgspec.json.encode(FEEDBACK_EVENT).replace(b"7200", b"7200.0").replace(b"completed", b"done")
    (found,) = invalid(raw)
    assert found.path == "action"


@pytest.mark.parametrize("dwell_ms", [0, 86_400_000])
def test_dwell_time_is_accepted_when_it_is_at_its_bounds(dwell_ms: int) -> None:
    (event,) = decode_json(json.dumps(payload(FEEDBACK_EVENT, dwell_ms=dwell_ms)).encode())
    assert getattr(event, "dwell_ms", None) == dwell_ms
