"""Decodes and validates events before they are stored. Every error names the place, as `[3].occurred_at` or `line 7` of
newline-delimited JSON, and the reason."""

import hashlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

import msgspec

from app.errors import InvalidInput, Issue, Undecodable
from app.events.ports import Admitted
from app.events.strict_json import UNDECODABLE, convert, decode, format_of, issue_of, undecodable
from app.features.clock import DAY_MS, rfc3339, to_ms
from app.features.events import KNOWN_SUBJECTS, MAX_DWELL_MS, Action, TipEvent
from app.features.ids import MAX_ID_LENGTH, id_problem
from app.telemetry import TRACEPARENT

MAX_EVENTS = 1_000
FUTURE_TOLERANCE_MS = 5 * 60_000
_DECODER: msgspec.json.Decoder[TipEvent] = msgspec.json.Decoder(TipEvent)
_RAW_DECODER: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_ENCODER = msgspec.json.Encoder(order="deterministic")
TABLE = "a table of columns"
LINES_EXPECTED = "send newline-delimited JSON in UTF-8, one event per line"
_FORMAT_BYTES = 4_096  # enough to recognise a format
_MOST_LINES = 100 * MAX_EVENTS  # blank lines included
# The most commas of a valid array: eight fields per event, and four ids that consist of commas.
_MOST_COMMAS = MAX_EVENTS * (8 + 4 * MAX_ID_LENGTH)
_ID_RULE = f"1 to {MAX_ID_LENGTH} characters without control characters or `/`, and not `.` or `..`"
_ALLOWED = {
    "subject": " or ".join(sorted(KNOWN_SUBJECTS)),
    "event_id": _ID_RULE,
    "user_id": _ID_RULE,
    "tip_id": _ID_RULE,
    "decision_id": f"{_ID_RULE}, or null",
    "occurred_at": "an RFC 3339 time with its UTC offset, as 2026-04-25T08:30:00+02:00",
    "action": " or ".join(", ".join(Action).rsplit(", ", 1)),
    "dwell_ms": f"a whole number from 0 to {MAX_DWELL_MS}, or null",
}


class Batch(list[TipEvent]):
    """A list of decoded events that remembers the place of each in its payload, for later errors. A place is `[3]` in
    an array, `line 7` in newline-delimited JSON, and empty for a single event."""

    def __init__(self, events: Iterable[TipEvent], places: Sequence[str]) -> None:
        super().__init__(events)
        self.places = tuple(places)


def path_to(events: Sequence[TipEvent], index: int, field: str) -> str:
    """The path of a field of the event at `index` in its payload, such as `[3].event_id`, for an error."""
    plain = f"[{index}]" if len(events) > 1 else ""
    place = events.places[index] if isinstance(events, Batch) else plain
    return _at(place, field)


def decode_json(body: bytes) -> Batch:
    """Decode a JSON body: one event, or an array of up to `MAX_EVENTS`. Raises `Undecodable` if the body is not JSON or
    not UTF-8, and `InvalidInput` if at least one event is invalid; each is named by its index."""
    text = body.lstrip(b" \t\r\n")
    if not text:
        raise Undecodable("the body is empty; send one event, an array of events, or newline-delimited JSON")
    if text[:1] != b"[":
        return _decode_each([msgspec.Raw(body)], [""])
    if body.count(b",") > _MOST_COMMAS:
        raise InvalidInput(f"at most {MAX_EVENTS} events per request; this array is longer or holds no events")
    try:
        items = _RAW_DECODER.decode(body)
        # `Raw` does not decode the items. Their UTF-8 is checked when each is decoded.
    except UNDECODABLE as error:
        raise Undecodable(f"the body is {undecodable(error, body)}") from error
    _check_count(len(items))
    return _decode_each(items, [f"[{index}]" for index in range(len(items))])


def decode_lines(body: bytes, first: int = 1) -> Batch:
    """Decode newline-delimited JSON as `decode_json` does, without blank lines. `first`: number of the first line."""
    if first == 1:
        body = body.removeprefix(BOM_UTF8)
        if (found := other_format(body[:_FORMAT_BYTES])) is not None:
            raise Undecodable(f"the body is {found}; {LINES_EXPECTED}", [Issue("line 1", f"{found}; {LINES_EXPECTED}")])
    if body.count(b"\n") > _MOST_LINES:
        raise InvalidInput(f"at most {MAX_EVENTS} events per request; this body has more than {_MOST_LINES} lines")
    lines = [(number, line) for number, line in enumerate(body.split(b"\n"), start=first) if line.strip()]
    if not lines:
        raise Undecodable("the body is empty; send one event per line")
    _check_count(len(lines))
    return _decode_each([msgspec.Raw(line) for _, line in lines], [f"line {number}" for number, _ in lines])


def other_format(head: bytes) -> str | None:
    """The format of a file, recognised by its first bytes `head`; None if it may be newline-delimited JSON."""
    if (name := format_of(head)) is not None:
        return name
    if len(head) > 1 and head[:2].count(0) == 1:  # UTF-16 without a byte order mark
        return "text in UTF-16"
    line = head.lstrip().partition(b"\n")[0].rstrip()
    if line.startswith(b"["):
        return "a JSON array"
    if line == b"{":
        return "one JSON document over several lines"
    if b"user_id" in line and b"{" not in line:
        return TABLE
    return None


def _check_count(events: int) -> None:
    # Called before anything is allocated per item: a body of eight megabytes may hold four million items.
    if events == 0:
        raise InvalidInput(f"the array is empty; send 1 to {MAX_EVENTS} events")
    if events > MAX_EVENTS:
        raise InvalidInput(f"at most {MAX_EVENTS} events per request, not {events}")


def _decode_each(items: Sequence[msgspec.Raw], places: Sequence[str]) -> Batch:
    events: list[TipEvent] = []
    broken: list[Issue] = []
    invalid: list[Issue] = []
    for item, place in zip(items, places, strict=True):
        try:
            events.append(decode(item, _DECODER))
            invalid.extend(_id_issues(events[-1], place))
        except msgspec.ValidationError as error:
            invalid.append(_issue(place, error))
        except UNDECODABLE as error:
            broken.append(Issue(place or "$", undecodable(error, bytes(item))))
    if broken:
        first = broken[0]
        raise Undecodable(f"{'the body' if first.path == '$' else first.path} is {first.detail}", broken)
    if invalid:
        raise InvalidInput("nothing was stored: the events below are invalid", invalid)
    return Batch(events, places)


def from_queue(payload: object, place: str) -> TipEvent:
    """Validate one event from the queue, already decoded from msgpack. Raises `InvalidInput`."""
    if isinstance(payload, dict) and isinstance(payload.get("occurred_at"), datetime):
        detail = f"a msgpack timestamp, which has no UTC offset; send {_ALLOWED['occurred_at']}"
        raise InvalidInput("not a tip event", [Issue(f"{place}.occurred_at", detail)])
    try:
        event: TipEvent = convert(payload, TipEvent)
        if not (issues := _id_issues(event, place)):
            return event
    except msgspec.ValidationError as error:
        issues = [_issue(place, error)]
    except RecursionError:
        issues = [Issue(place, "nested too deeply")]
    raise InvalidInput("not a tip event", issues)


def _issue(place: str, error: msgspec.ValidationError) -> Issue:
    """Make an issue from an error of msgspec: the path of the field, the reason, and the values that are allowed."""
    found = issue_of(error)
    path, detail = found.path, found.detail
    if detail == "unknown field":
        detail = "unknown field; events of this subject have no field of that name"
    elif (allowed := _ALLOWED.get(path)) is not None:
        detail = f"{detail.replace('Invalid value', 'unknown subject')}; allowed is {allowed}"
    return Issue(_at(place, path), detail)


def _at(place: str, field: str) -> str:
    return place or "$" if field == "$" else f"{place}.{field}".removeprefix(".")


def _id_issues(event: TipEvent, place: str) -> list[Issue]:
    return [
        Issue(_at(place, name), problem)
        for name in ("event_id", "user_id", "tip_id", "decision_id")
        if (value := getattr(event, name)) is not None and (problem := id_problem(value)) is not None
    ]


def admit(
    events: Sequence[TipEvent], now_ms: int, retention_days: int, sent_by: str = "", *, historical: bool = False
) -> list[Admitted]:
    """Give each event the time that features use: its own, or `now_ms` if its own is ahead of that. `sent_by` and
    `historical` are stored with the events; see `Admitted`. Raises `InvalidInput`, with each event that is older than
    the retention, or more than `FUTURE_TOLERANCE_MS` ahead of the clock."""
    oldest_ms = now_ms - retention_days * DAY_MS
    admitted: list[Admitted] = []
    traceparent = TRACEPARENT.get()
    problems: dict[int, str] = {}
    for index, event in enumerate(events):
        try:
            claimed_ms = to_ms(event.occurred_at)
        except OverflowError:
            problems[index] = "the time is out of range"
            continue
        if claimed_ms > now_ms + FUTURE_TOLERANCE_MS:
            problems[index] = f"more than five minutes ahead of the server's clock, {rfc3339(now_ms)}"
        elif claimed_ms < oldest_ms:
            problems[index] = f"older than the retention of {retention_days} days"
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
                    sent_by=sent_by,
                    historical=historical,
                    traceparent=traceparent,
                )
            )
    if problems:
        issues = [Issue(path_to(events, index, "occurred_at"), problem) for index, problem in problems.items()]
        raise InvalidInput("nothing was stored: the event times below are out of bounds", issues)
    return admitted


def digest(event: TipEvent) -> bytes:
    """A hash of 16 bytes, equal for equal events, by which a repeated event is recognised. The event time is rounded
    down to milliseconds first, as it is stored. So an event that is read from the log and sent again is a duplicate."""
    if beyond := event.occurred_at.microsecond % 1000:
        event = msgspec.structs.replace(event, occurred_at=event.occurred_at - timedelta(microseconds=beyond))
    return hashlib.blake2b(_ENCODER.encode(event), digest_size=16).digest()
