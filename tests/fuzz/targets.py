"""Targets of coverage-guided fuzzing. Each takes arbitrary bytes and raises if an invariant does not hold.

`tests.fuzz.guided` runs them under atheris, and `tests/fuzz/test_targets.py` with the stored corpus.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import hiredis
import msgspec

from app.api.middleware.edge import _rejection
from app.api.middleware.fast_path import _PATH
from app.api.request_parsing import known_ms, moment_ms
from app.errors import InvalidInput, Undecodable
from app.events.validation import admit, decode_json, decode_lines, digest, from_queue, path_to
from app.features.clock import rfc3339
from app.features.events import TipEvent
from app.features.ids import id_problem
from app.profiles.online.cache_protocol import FeatureMask, ReadTime, decode, encode
from app.profiles.ports import Cell
from app.stores.valkey.cache import key, mget
from tests.support.registry import REGISTRY

NOW_MS = 1_777_000_000_000
# Times that the service writes in answers: the years 1000 to 9999.
_WRITTEN = (-30_610_224_000_000, 253_402_300_800_000)
_MASK = FeatureMask(REGISTRY, 1)


def codec(raw: bytes) -> None:
    """A cached value survives encoding and decoding, and both readers agree on it."""
    found = decode(raw)
    if found is None:
        return
    assert found.json
    again = decode(encode(found))
    assert again == found
    known = encode(found._replace(fingerprint=REGISTRY[0].fingerprint.encode()))
    at = ReadTime.of(found.computed_at_ms)
    fast = _MASK.values([known], at)
    assert fast is None or list(fast) == [found.json]
    # A reader of several values does not mix them up.
    two = _MASK.rows([known, known], at)
    assert two is None or [list(row) for row in two] == [[found.json], [found.json]]


def _check_events(events: list[TipEvent]) -> None:
    for index, event in enumerate(events):
        for name in ("event_id", "user_id", "tip_id", "decision_id"):
            value = getattr(event, name)
            assert value is None or id_problem(value) is None
        (again,) = decode_json(msgspec.json.encode(event))
        assert again == event
        assert digest(again) == digest(event)
        assert path_to(events, index, "x").endswith("x")
    try:
        admitted = admit(events, NOW_MS, 180)
    except InvalidInput as error:
        _check_error(error)
        return
    for item in admitted:
        assert NOW_MS - 180 * 86_400_000 <= item.occurred_at_ms <= NOW_MS
        assert -1_440 < item.utc_offset_min < 1_440
        assert rfc3339(item.occurred_at_ms)


def _check_error(error: Undecodable | InvalidInput) -> None:
    """The error has a path and a reason, and does not repeat the input."""
    assert all(issue.path and issue.detail for issue in error.issues)
    assert all(len(issue.path) < 400 and len(issue.detail) < 600 for issue in error.issues)
    str(error).encode()


def events(raw: bytes) -> None:
    """A body is decoded into valid events, or rejected with an error of the service."""
    for door in (decode_json, decode_lines):
        try:
            found = door(raw)
        except (Undecodable, InvalidInput) as error:
            _check_error(error)
        else:
            _check_events(found)


def queue(raw: bytes) -> None:
    """A payload of the queue is decoded into a valid event, or rejected with an error of the service."""
    try:
        payload = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return
    try:
        found = from_queue(payload, "[0]")
    except InvalidInput as error:
        _check_error(error)
    else:
        _check_events([found])


def ids(raw: bytes) -> None:
    """Different ids have different keys, and a path is decoded to the id that it was made from."""
    one, _, other = raw.decode("utf-8", "surrogateescape").partition("\n")
    valid = [user for user in (one, other) if id_problem(user) is None]
    made = [key("0123abcd", Cell(user, "tip_volume_30d")) for user in valid]
    for user, found in zip(valid, made, strict=True):
        assert found.isascii()
        assert found.decode().isprintable()
        assert " " not in found.decode()
        assert (found.count(b"{"), found.count(b"}")) == (1, 1)
        packed = hiredis.pack_command((b"MGET", found, found))  # type: ignore[arg-type]  # it takes any number
        assert mget("0123abcd", [(user, (b"tip_volume_30d",))] * 2) == packed
        _check_path(user)
    if len(valid) == 2:
        assert (made[0] == made[1]) == (one == other)


def _check_path(user: str) -> None:
    raw_path = b"/profiles/" + quote(user, safe="").encode()
    scope: Any = {"path": "", "raw_path": raw_path, "query_string": b"", "headers": []}
    scope["path"] = raw_path.decode()
    assert _rejection(scope) is None
    assert scope["path"] == f"/profiles/{user}"
    plain = _PATH(raw_path)
    assert plain is None or plain[1].decode() == user


def paths(raw: bytes) -> None:
    """A path is decoded once and strictly, or rejected; the fast path agrees."""
    scope: Any = {"path": "/", "raw_path": b"/profiles/" + raw, "query_string": raw, "headers": []}
    with suppress(UnicodeDecodeError):
        scope["path"] = (b"/profiles/" + raw.partition(b"?")[0]).decode()
        refusal = _rejection(scope)
        assert refusal is None or refusal[0] in (400, 404, 422)
        plain = _PATH(scope["raw_path"])
        if plain is not None:
            assert refusal is None
            assert scope["path"] == f"/profiles/{plain[1].decode()}"


def moments(raw: bytes) -> None:
    """A time in a query or a body is decoded and survives a round trip, or is rejected."""
    text = raw.decode(errors="replace")
    with suppress(Undecodable):
        found = moment_ms(text, "as_of")
        if _WRITTEN[0] <= found < _WRITTEN[1]:
            assert moment_ms(rfc3339(found), "as_of") == found
    with suppress(InvalidInput):
        known = known_ms(text)
        if _WRITTEN[0] <= known < _WRITTEN[1]:
            assert known_ms(rfc3339(known)) == known


TARGETS: dict[str, Callable[[bytes], None]] = {
    "codec": codec,
    "events": events,
    "queue": queue,
    "ids": ids,
    "paths": paths,
    "moments": moments,
}
