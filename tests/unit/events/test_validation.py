"""The accepted shapes of a body, and the messages about a body that cannot be read."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from app.errors import InvalidInput, Issue, Undecodable
from app.events.validation import MAX_EVENTS, decode_json, decode_lines
from tests.support.events import body, feedback, payload, served

FEEDBACK_EVENT = feedback("ann", dwell_ms=7_200, offset_min=120, event_id="e-1")


def invalid(raw: bytes) -> list[Issue]:
    """The issues of a body that is valid JSON."""
    with pytest.raises(InvalidInput) as caught:
        decode_json(raw)
    assert caught.value.issues
    return list(caught.value.issues)


def undecodable(raw: bytes) -> str:
    """The whole message about a body that cannot be read."""
    with pytest.raises(Undecodable) as caught:
        decode_json(raw)
    return " ".join([str(caught.value), *(f"{issue.path}: {issue.detail}" for issue in caught.value.issues)])


def test_event_is_decoded_when_it_is_sent_alone_or_in_an_array() -> None:
    other = served("bob", event_id="e-2")
    assert decode_json(b" \r\n" + msgspec.json.encode(FEEDBACK_EVENT) + b"\n") == [FEEDBACK_EVENT]
    assert decode_json(body(FEEDBACK_EVENT, other)) == [FEEDBACK_EVENT, other]
    lines = b"\n" + msgspec.json.encode(FEEDBACK_EVENT) + b"\r\n\n  \n" + msgspec.json.encode(other)
    assert decode_lines(lines) == [FEEDBACK_EVENT, other]


@pytest.mark.parametrize("escaped", [r"\ud800", r"\udc00", r"a\ud83d", r"\ude00\ud83d"])
def test_body_is_refused_when_an_id_holds_a_lone_surrogate(escaped: str) -> None:
    raw = msgspec.json.encode(FEEDBACK_EVENT).replace(b"e-1", escaped.encode())
    with pytest.raises((Undecodable, InvalidInput)) as caught:
        decode_json(raw)
    assert "surrogate" in undecodable(raw) or "U+D" in str(caught.value)


def test_surrogate_pair_is_one_character_when_it_is_whole() -> None:
    (event,) = decode_json(msgspec.json.encode(FEEDBACK_EVENT).replace(b"e-1", rb"\ud83d\ude00" * 128))
    assert event.event_id == "😀" * 128


def test_body_is_refused_when_a_number_is_not_json() -> None:
    for number in ("NaN", "Infinity", "-Infinity", "nan", "0x10", "007", "+1", "1_000", "1."):
        raw = msgspec.json.encode(FEEDBACK_EVENT).replace(b"7200", number.encode())
        assert "not valid JSON" in undecodable(raw), number


def test_body_is_refused_when_it_is_empty() -> None:
    for raw in (b"", b" \r\n\t"):
        assert "empty" in undecodable(raw)
        with pytest.raises(Undecodable, match="empty"):
            decode_lines(raw)


def test_array_is_refused_when_it_is_empty() -> None:
    for raw in (b"[]", b" [ ] "):
        with pytest.raises(InvalidInput, match="1 to 1000 events"):
            decode_json(raw)


def test_body_is_refused_when_it_holds_no_event() -> None:
    for raw in (b"5", b'"event"', b"null", b"true", b"[5]", b"[null]", b"[[]]"):
        (found,) = invalid(raw)
        assert found.path == ("[0]" if raw.startswith(b"[") else "$")
        assert "Expected `object`" in found.detail, raw


def test_body_is_refused_when_it_is_no_json() -> None:
    half = (b"{", b"[", b"[{}", b"{]", b"{'a': 1}", b'{"a": 1}}', b"[{},]", b'"a', b'{"mood": 1, oops}')
    for raw in (*half, b"\xef\xbb\xbf{}", b"<event/>"):
        assert "not valid JSON" in undecodable(raw), raw


def test_body_is_refused_when_it_is_no_utf8() -> None:
    for bad in (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"):
        for shape in (b"%s", b"[%s]"):
            raw = shape % msgspec.json.encode(FEEDBACK_EVENT).replace(b"e-1", bad)
            assert "not valid UTF-8" in undecodable(raw), raw


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'[{"subject":' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        b'{"mood":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    ],
    ids=["open arrays", "arrays", "open objects", "in a field of many", "in an unknown field"],
)
def test_body_is_refused_when_it_is_nested_deeply(raw: bytes) -> None:
    assert "nested too deeply" in undecodable(raw)
    with pytest.raises((Undecodable, InvalidInput)):
        decode_lines(raw)


def test_array_is_refused_when_it_holds_more_events_than_allowed() -> None:
    one = msgspec.json.encode(FEEDBACK_EVENT)
    assert len(decode_json(b"[" + b",".join([one] * MAX_EVENTS) + b"]")) == 1_000
    assert len(decode_lines(b"\n".join([one] * MAX_EVENTS))) == 1_000
    with pytest.raises(InvalidInput, match="not 1001"):
        decode_json(b"[" + b",".join([one] * 1_001) + b"]")
    with pytest.raises(InvalidInput, match="not 1001"):
        decode_lines(b"\n".join([one] * 1_001))


BODY_BYTES = 8 * 1024 * 1024
WHOLE = 48 * 1024 * 1024


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < WHOLE


@pytest.mark.parametrize("item", [b"1,", b"{},", b"[[]],", b'"",', b"1\n", b"[]\n", b"\n", b" \n"])
def test_body_of_millions_of_elements_takes_little_memory(item: bytes) -> None:
    raw = item * (BODY_BYTES // len(item))
    decode: Callable[[bytes], object] = decode_lines
    if item.endswith(b","):
        decode, raw = decode_json, b"[" + raw.removesuffix(b",") + b"]"
    with little_memory(), pytest.raises((InvalidInput, Undecodable)):
        decode(raw)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [b'{"mood":[%b]}', b'{"mood":{"a":[%b]}}'])
def test_unknown_field_of_millions_takes_little_memory(shape: bytes) -> None:
    raw = shape % b",".join([b"[]"] * 2_000_000)
    with little_memory():
        found = invalid(raw)[0]
        assert "missing" in found.detail or "unknown" in found.detail


def test_ids_full_of_commas_are_decoded() -> None:
    one = json.dumps(
        payload(FEEDBACK_EVENT, **dict.fromkeys(("user_id", "tip_id", "event_id", "decision_id"), "," * 128))
    )
    assert len(decode_json(b"[" + b",".join([one.encode()] * MAX_EVENTS) + b"]")) == MAX_EVENTS


def test_every_invalid_event_of_an_array_is_named() -> None:
    sound = json.dumps(payload(FEEDBACK_EVENT))
    broken = [json.dumps(payload(FEEDBACK_EVENT, **{name: 5})) for name in ("action", "tip_id")]
    found = invalid(f"[{sound},{broken[0]},{sound},{broken[1]}]".encode())
    assert [item.path for item in found] == ["[1].action", "[3].tip_id"]


def test_line_is_named_when_it_is_no_json() -> None:
    lines = [msgspec.json.encode(FEEDBACK_EVENT)] * 10
    lines[2] = b""
    lines[6] = b'{"subject": oops}'
    with pytest.raises(Undecodable, match=r"line 7 is not valid JSON") as caught:
        decode_lines(b"\n".join(lines))
    assert [issue.path for issue in caught.value.issues] == ["line 7"]


def test_line_is_named_when_it_is_no_utf8_or_no_event() -> None:
    sound = msgspec.json.encode(FEEDBACK_EVENT)
    with pytest.raises(Undecodable, match=r"line 2 is not valid UTF-8"):
        decode_lines(sound + b"\n" + sound.replace(b"e-1", b"\xff"))
    with pytest.raises(InvalidInput) as caught:
        decode_lines(b"\n\n" + sound.replace(b"completed", b"done") + b"\n" + body(FEEDBACK_EVENT))
    assert [issue.path for issue in caught.value.issues] == ["line 3.action", "line 4"]
