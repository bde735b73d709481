"""Decoding payloads and deciding which events are let in.

Every refusal names the place (`[3].occurred_at`, or `line 7` of newline-delimited JSON) and the reason. Nothing here
has an effect: whatever is raised, nothing was stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import msgspec

from app.errors import InvalidInput, Issue, Undecodable
from app.events.ports import Admitted
from app.features.clock import DAY_MS, rfc3339, to_ms
from app.features.events import KNOWN_SUBJECTS, TipEvent
from app.features.ids import id_problem

MAX_EVENTS = 1_000
FUTURE_TOLERANCE_MS = 5 * 60_000
_DECODER: msgspec.json.Decoder[TipEvent] = msgspec.json.Decoder(TipEvent)
_RAW_DECODER: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_ENCODER = msgspec.json.Encoder(order="deterministic")
_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")


def decode_json(body: bytes) -> list[TipEvent]:
    """One event or an array of up to 1,000.

    Raises:
        Undecodable: not JSON or not UTF-8.
        InvalidInput: naming every event at fault by its index.
    """
    text = body.lstrip(b" \t\r\n")
    if not text:
        raise Undecodable("the body is empty; send one event, an array of events, or newline-delimited JSON")
    if text[:1] != b"[":
        return _decode_each([msgspec.Raw(body)], [""])
    try:
        items = _RAW_DECODER.decode(body)
        # Raw keeps the bytes unread; UTF-8 is checked when each is decoded.
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Undecodable(f"the body is not valid JSON: {error}") from error
    return _decode_each(items, [f"[{index}]" for index in range(len(items))])


def decode_lines(body: bytes) -> list[TipEvent]:
    """Newline-delimited JSON, blank lines ignored; raises as `decode_json`, naming lines from 1."""
    lines = [(number, line) for number, line in enumerate(body.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise Undecodable("the body is empty; send one event per line")
    return _decode_each([msgspec.Raw(line) for _, line in lines], [f"line {number}" for number, _ in lines])


def _decode_each(items: Sequence[msgspec.Raw], places: Sequence[str]) -> list[TipEvent]:
    if not items:
        raise InvalidInput("the array is empty; send 1 to 1,000 events")
    if len(items) > MAX_EVENTS:
        raise InvalidInput(f"at most {MAX_EVENTS} events at once, not {len(items)}")
    events: list[TipEvent] = []
    broken: list[Issue] = []
    invalid: list[Issue] = []
    for item, place in zip(items, places, strict=True):
        try:
            event = _DECODER.decode(item)
        except msgspec.ValidationError as error:
            invalid.append(_issue(place, str(error)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            broken.append(Issue(place or "$", f"not valid JSON: {error}"))
        else:
            invalid.extend(_id_issues(event, place))
            events.append(event)
    if broken:
        where = broken[0].path
        raise Undecodable(f"not valid JSON{'' if where == '$' else f' at {where}'}", broken)
    if invalid:
        raise InvalidInput("nothing was stored: the events below are invalid", invalid)
    return events


def from_queue(payload: object, place: str) -> TipEvent:
    """One event as it came by the queue, already decoded from msgpack; raises `InvalidInput`."""
    try:
        event = msgspec.convert(payload, TipEvent)
    except msgspec.ValidationError as error:
        raise InvalidInput("not a tip event", [_issue(place, str(error))]) from error
    if issues := _id_issues(event, place):
        raise InvalidInput("not a tip event", issues)
    return event


def _issue(place: str, message: str) -> Issue:
    found = _AT.search(message)
    path = f"{place}{found['path']}" if found else place
    text = _AT.sub("", message)
    if text.startswith("Invalid value '") and path.endswith(".subject"):
        text = f"unknown subject {text[14:]}; known are {', '.join(sorted(KNOWN_SUBJECTS))}"
    if "RFC3339" in text:
        text = f"{text}: expected a time with its UTC offset, as 2026-04-25T08:30:00+02:00"
    if "have a timezone" in text:
        text = "the time needs its UTC offset, as 2026-04-25T08:30:00+02:00"
    return Issue(path.removeprefix(".") or "$", text)


def _id_issues(event: TipEvent, place: str) -> list[Issue]:
    issues: list[Issue] = []
    for name in ("event_id", "user_id", "tip_id", "decision_id"):
        value = getattr(event, name)
        if value is not None and (problem := id_problem(value)) is not None:
            issues.append(Issue(f"{place}.{name}".removeprefix("."), problem))
    return issues


@dataclass(frozen=True, slots=True)
class Admission:
    """The rule for event times: not older than the retention, at most five minutes ahead of the clock."""

    retention_days: int

    def admit(self, events: Sequence[TipEvent], now_ms: int) -> list[Admitted]:
        """Give each event its event time.

        Raises:
            InvalidInput: naming every event whose time is refused.
        """
        oldest_ms = now_ms - self.retention_days * DAY_MS
        admitted: list[Admitted] = []
        issues: list[Issue] = []
        for index, event in enumerate(events):
            path = f"[{index}].occurred_at" if len(events) > 1 else "occurred_at"
            try:
                claimed_ms = to_ms(event.occurred_at)
            except OverflowError:
                issues.append(Issue(path, "the time is out of range"))
                continue
            if claimed_ms > now_ms + FUTURE_TOLERANCE_MS:
                issues.append(Issue(path, f"more than five minutes in the future; it is {rfc3339(now_ms)} here"))
            elif claimed_ms < oldest_ms:
                issues.append(Issue(path, f"older than the {self.retention_days} days that events are kept"))
            else:
                early = claimed_ms > now_ms
                offset = event.occurred_at.utcoffset() or timedelta(0)
                admitted.append(
                    Admitted(
                        event=event,
                        digest=digest(event),
                        occurred_at_ms=now_ms if early else claimed_ms,
                        utc_offset_min=offset // timedelta(minutes=1),
                        claimed_at_ms=claimed_ms if early else None,
                        received_at_ms=now_ms,
                    )
                )
        if issues:
            raise InvalidInput("nothing was stored: the event times below are refused", issues)
        return admitted


def digest(event: TipEvent) -> bytes:
    """16 bytes that tell whether two events with one id have the same content."""
    return hashlib.blake2b(_ENCODER.encode(event), digest_size=16).digest()
