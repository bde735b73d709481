"""`POST /events`: the producers' contract."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from app.errors import StoreFull, StoreUnavailable
from app.features.clock import DAY_MS
from app.stores.sqlite.event_log import SqliteEventLog
from tests.support.events import body, feedback, local_time, payload, served
from tests.support.live import JSON, NDJSON, Live, new_user, paths, problem


def lines(*items: object) -> bytes:
    return b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in items)


async def test_event_is_taken_in_when_it_comes_alone(site: Live) -> None:
    user = new_user()
    answer = await site.client.post("/events", json=payload(served(user, site.now_ms)))
    assert answer.status_code == 202
    assert answer.json() == {"accepted": 1, "duplicates": 0, "invalidated": True}
    assert answer.headers["cache-control"] == "no-store"
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_events_are_taken_in_when_they_come_as_an_array(site: Live) -> None:
    user = new_user()
    receipt = await site.send(*(served(user, site.now_ms) for _ in range(1_000)))
    assert receipt == {"accepted": 1_000, "duplicates": 0, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 1_000


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\n\n  \n"])
async def test_events_are_taken_in_when_they_come_as_lines(site: Live, separator: bytes) -> None:
    user = new_user()
    sent = separator.join(json.dumps(payload(served(user, site.now_ms))).encode() for _ in range(3)) + separator
    answer = await site.client.post("/events", content=sent, headers=NDJSON)
    assert answer.json() == {"accepted": 3, "duplicates": 0, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 3


async def test_event_counts_once_when_it_is_sent_again(site: Live) -> None:
    user = new_user()
    event = served(user, site.now_ms)
    assert (await site.send(event))["accepted"] == 1
    assert await site.send(event, served(user, site.now_ms)) == {"accepted": 1, "duplicates": 1, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 2


async def test_event_counts_once_when_one_request_holds_it_twice(site: Live) -> None:
    event = served(new_user(), site.now_ms)
    assert await site.send(event, event) == {"accepted": 1, "duplicates": 1, "invalidated": True}


async def test_request_conflicts_when_an_id_is_known_with_other_content(site: Live) -> None:
    user = new_user()
    known = served(user, site.now_ms, event_id=new_user("event"))
    await site.send(known)
    other = served(user, site.now_ms, event_id=known.event_id, tip_id="another")
    answer = await site.client.post("/events", content=body(served(user, site.now_ms), other), headers=JSON)
    conflict = problem(answer, 409)
    assert known.event_id in conflict["detail"]
    assert paths(conflict) == ["[1].event_id"]
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_next_read_reflects_the_event_when_many_write_and_read_at_once(site: Live) -> None:
    users = [new_user() for _ in range(20)]

    async def write_then_read(user: str) -> list[int]:
        counts = []
        for _ in range(3):
            await site.send(served(user, site.now_ms))
            counts.append((await site.features(user))["tip_volume_30d"])
        return counts

    assert await asyncio.gather(*map(write_then_read, users)) == [[1, 2, 3]] * len(users)


async def test_event_counts_from_its_arrival_when_its_clock_is_a_little_ahead(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms + 4 * 60_000))
    assert (await site.features(user))["tip_volume_30d"] == 1


def _bad_events(now_ms: int) -> dict[str, tuple[object, int, list[str]]]:
    view, reaction = payload(served("u", now_ms)), payload(feedback("u", now_ms, dwell_ms=1))
    naive = local_time(now_ms).replace(tzinfo=None).isoformat()
    future = (local_time(now_ms) + timedelta(minutes=5, seconds=30)).isoformat()
    cases: dict[str, tuple[object, int, list[str]]] = {
        "null": (None, 422, ["$"]),
        "a number": (1, 422, ["$"]),
        "a text": ("event", 422, ["$"]),
        "no events": ([], 422, []),
        "too many events": ([view] * 1_001, 422, []),
        "nothing in it": ({}, 422, ["subject"]),
        "unknown subject": ({**view, "subject": "signals.tip.forgotten"}, 422, ["subject"]),
        "subject a number": ({**view, "subject": 1}, 422, ["subject"]),
        "unknown field": ({**view, "colour": "red"}, 422, ["colour"]),
        "field of the other subject": ({**view, "action": "completed"}, 422, ["action"]),
        "no action": ({k: v for k, v in reaction.items() if k != "action"}, 422, ["action"]),
        "unknown action": ({**reaction, "action": "eaten"}, 422, ["action"]),
        "dwell below zero": ({**reaction, "dwell_ms": -1}, 422, ["dwell_ms"]),
        "dwell above a day": ({**reaction, "dwell_ms": 86_400_001}, 422, ["dwell_ms"]),
        "dwell beyond 64 bits": ({**reaction, "dwell_ms": 2**64}, 422, ["dwell_ms"]),
        "dwell far beyond 64 bits": ({**reaction, "dwell_ms": 10**400}, 422, ["dwell_ms"]),
        "dwell no whole number": ({**reaction, "dwell_ms": 1.5}, 422, ["dwell_ms"]),
        "dwell a text": ({**reaction, "dwell_ms": "1"}, 422, ["dwell_ms"]),
        "dwell NaN": ({**reaction, "dwell_ms": float("nan")}, 400, ["$"]),
        "dwell infinite": ({**reaction, "dwell_ms": float("inf")}, 400, ["$"]),
        "time without offset": ({**view, "occurred_at": naive}, 422, ["occurred_at"]),
        "time far ahead": ({**view, "occurred_at": future}, 422, ["occurred_at"]),
        "time of the year 9999": ({**view, "occurred_at": "9999-12-31T23:59:59-14:00"}, 422, ["occurred_at"]),
        "time of the year 1": ({**view, "occurred_at": "0001-01-01T00:00:00+14:00"}, 422, ["occurred_at"]),
        "time a number": ({**view, "occurred_at": now_ms}, 422, ["occurred_at"]),
        "time beyond kept history": (payload(served("u", now_ms - 181 * DAY_MS)), 422, ["occurred_at"]),
        "second of two": ([view, {**view, "tip_id": None}], 422, ["[1].tip_id"]),
        "both of two": ([1, {**view, "tip_id": ""}], 422, ["[0]", "[1].tip_id"]),
    }
    for name in ("event_id", "user_id", "tip_id", "decision_id"):
        for label, value in {
            "empty": "",
            "over-long": "x" * 129,
            "with a slash": "a/b",
            "with a newline": "a\nb",
            "with NUL": "a\0b",
            "with DEL": "a\x7fb",
            "with a C1 control": "a\x85b",
            "one dot": ".",
            "two dots": "..",
            "a number": 1,
        }.items():
            cases[f"{name} {label}"] = ({**view, name: value}, 422, [name])
    return cases


@pytest.mark.parametrize("case", _bad_events(0))
async def test_event_is_refused_when_it_is_invalid(site: Live, case: str) -> None:
    event, status, places = _bad_events(site.now_ms)[case]
    answer = await site.client.post("/events", content=json.dumps(event).encode(), headers=JSON)
    assert paths(problem(answer, status)) == places


UNDECODABLE = {
    "no body": b"",
    "white space": b" \n\t",
    "no JSON": b"nonsense",
    "cut off": b'{"subject": "signals.tip.served"',
    "array cut off": b'[{"subject": "signals.tip.served"}',
    "two documents": b"[] []",
    "invalid UTF-8": b'{"subject": "\xff"}',
    "invalid UTF-8 in an array": b'[{"subject": "\xff"}]',
    "lone surrogate": b'{"subject": "signals.tip.served", "event_id": "\\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"subject": "signals.tip.served"}',
    "UTF-16": '{"subject": "signals.tip.served"}'.encode("utf-16"),
    "nested without end": b"[" * 100_000,
    "objects nested without end": b'{"a":' * 100_000,
    "NUL": b"\0",
}


@pytest.mark.parametrize("case", UNDECODABLE)
async def test_request_is_refused_when_its_body_cannot_be_decoded(site: Live, case: str) -> None:
    problem(await site.client.post("/events", content=UNDECODABLE[case], headers=JSON), 400)
    if UNDECODABLE[case].strip():
        problem(await site.client.post("/profiles/batch", content=UNDECODABLE[case], headers=JSON), 400)


async def test_upload_is_refused_naming_the_line_when_line_seven_is_no_json(site: Live) -> None:
    user = new_user()
    sound = [payload(served(user, site.now_ms)) for _ in range(8)]
    sent = lines(*sound[:3], b"", *sound[3:5], b"{oops", *sound[5:])
    refused = problem(await site.client.post("/events", content=sent, headers=NDJSON), 400)
    assert refused["detail"].startswith("line 7 is not valid JSON")
    assert paths(refused) == ["line 7"]
    assert (await site.features(user))["tip_volume_30d"] == 0


async def test_upload_is_refused_naming_the_line_when_one_is_invalid(site: Live) -> None:
    sound: dict[str, Any] = payload(served(new_user(), site.now_ms))
    sent = lines(sound, {**sound, "user_id": ""}, b"7")
    refused = problem(await site.client.post("/events", content=sent, headers=NDJSON), 422)
    assert paths(refused) == ["line 2.user_id", "line 3"]


async def test_nothing_is_stored_when_one_event_of_many_is_refused(site: Live) -> None:
    user = new_user()
    sent = [payload(served(user, site.now_ms)) for _ in range(50)]
    sent[31]["occurred_at"] = "2099-01-01T00:00:00Z"
    refused = problem(await site.client.post("/events", json=sent), 422)
    assert paths(refused) == ["[31].occurred_at"]
    assert "nothing was stored" in refused["detail"]
    assert (await site.features(user))["tip_volume_30d"] == 0


async def test_events_are_refused_for_now_when_the_database_does_not_answer(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def append(*_: object) -> None:
        raise StoreUnavailable("the database does not answer: disk I/O error")

    monkeypatch.setattr(SqliteEventLog, "append", append)
    answer = await site.client.post("/events", content=body(served(new_user(), site.now_ms)), headers=JSON)
    problem(answer, 503)
    assert answer.headers["retry-after"] == "1"


async def test_events_are_refused_as_too_much_to_store_when_the_disk_is_full(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def append(*_: object) -> None:
        raise StoreFull("the database has no room to write: database or disk is full")

    monkeypatch.setattr(SqliteEventLog, "append", append)
    answer = await site.client.post("/events", content=body(served(new_user(), site.now_ms)), headers=JSON)
    assert "no room" in problem(answer, 507)["detail"]
    assert answer.headers["retry-after"] == "10"
