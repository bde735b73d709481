"""What coverage-guided fuzzing drives: each target takes any bytes and raises where an invariant does not hold.

They know no fuzzer: `tests.fuzz.guided` drives them with atheris, `tests/fuzz/test_targets.py` with what was found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import msgspec

from app.api.middleware.edge import _rejection
from app.api.middleware.fast_path import _PATH
from app.api.request_parsing import known_ms, moment_ms
from app.errors import InvalidInput, Undecodable
from app.events.admission import Admission, decode_json, decode_lines, digest, from_queue, path_to
from app.features.clock import rfc3339
from app.features.events import TipEvent
from app.features.ids import id_problem
from app.profiles.codec import decode, encode, hits
from app.profiles.ports import Cell
from app.stores.valkey.cache import key, keys_of

NOW_MS = 1_777_000_000_000
# The moments that are ever written: no answer names one that is refused.
_WRITTEN = (-30_610_224_000_000, 253_402_300_800_000)  # the years 1000 to 9999
_ADMISSION = Admission(180)


def codec(raw: bytes) -> None:
    """What stands in a key: a value is read as it was written, whoever wrote it, and both readers agree."""
    found = decode(raw)
    if found is None:
        return
    assert found.json
    again = decode(encode(found))
    assert again == found
    fast = hits([found.fingerprint])([raw])
    assert fast is None or list(fast) == [found.json]
    # A reader of several takes none of them for another.
    two = hits([found.fingerprint, found.fingerprint])([raw, raw])
    assert two is None or list(two) == [found.json, found.json]


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
        admitted = _ADMISSION.admit(events, NOW_MS)
    except InvalidInput as error:
        _short(error)
        return
    for item in admitted:
        assert NOW_MS - 180 * 86_400_000 <= item.occurred_at_ms <= NOW_MS
        assert -1_440 < item.utc_offset_min < 1_440
        assert rfc3339(item.occurred_at_ms)


def _short(error: Undecodable | InvalidInput) -> None:
    """A refusal says where and why, and does not send back what came."""
    assert all(issue.path and issue.detail for issue in error.issues)
    assert all(len(issue.path) < 400 and len(issue.detail) < 600 for issue in error.issues)
    str(error).encode()


def events(raw: bytes) -> None:
    """A body of events is decoded into sound events, or refused with the service's own errors."""
    for door in (decode_json, decode_lines):
        try:
            found = door(raw)
        except (Undecodable, InvalidInput) as error:
            _short(error)
        else:
            _check_events(found)


def queue(raw: bytes) -> None:
    """A payload of the queue: the same, from msgpack."""
    try:
        payload = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return
    try:
        found = from_queue(payload, "[0]")
    except InvalidInput as error:
        _short(error)
    else:
        _check_events([found])


def ids(raw: bytes) -> None:
    """Two ids never share a key, and a path leads to the id it was made from."""
    one, _, other = raw.decode("utf-8", "surrogateescape").partition("\n")
    sound = [user for user in (one, other) if id_problem(user) is None]
    made = [key("0123abcd", Cell(user, "tip_volume_30d")) for user in sound]
    for user, found in zip(sound, made, strict=True):
        assert found.isascii()
        assert found.decode().isprintable()
        assert " " not in found.decode()
        assert (found.count(b"{"), found.count(b"}")) == (1, 1)
        assert keys_of("0123abcd", [(user, [b"tip_volume_30d"])]) == [found]
        _check_path(user)
    if len(sound) == 2:
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
    """A path as it comes over the wire is decoded once and strictly, or refused; the hit path agrees."""
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
    """A time of a query or a body is a moment, or refused."""
    text = raw.decode(errors="replace")
    with suppress(Undecodable):
        found = moment_ms(text, "as_of")
        if _WRITTEN[0] <= found < _WRITTEN[1]:
            assert moment_ms(rfc3339(found), "as_of") == found
    with suppress(InvalidInput):
        known = known_ms(text)
        if known is not None and _WRITTEN[0] <= known < _WRITTEN[1]:
            assert known_ms(rfc3339(known)) == known


TARGETS: dict[str, Callable[[bytes], None]] = {
    "codec": codec,
    "events": events,
    "queue": queue,
    "ids": ids,
    "paths": paths,
    "moments": moments,
}
